"""The products' benchmark: its command, its record, and what it says of one; on a GPU, that products are products."""

from __future__ import annotations

import json
import types

import numpy as np
import pytest
import torch

from benchmarks.__main__ import load_report, main
from benchmarks.gemm import tensorrt_peer
from benchmarks.gemm.record import GemmResults
from benchmarks.gemm.run import FEW_ROWS, Problem, Setup, measure_case, set_up, to_fp8
from benchmarks.kernels.record import Bandwidth
from benchmarks.kernels.run import MissingError
from benchmarks.kernels.timing import CudaTimer
from tests.support.fakes import tensorrt as fake_tensorrt
from tests.support.fakes.tensorrt_execute import execute
from tests.support.packed_weights import unpack_weight
from tests.support.rejection import rejected
from tests.support.tolerance import sum_rounding


class _Timer:
    """Runs what is to be timed once, and says that it took as many µs as its launches give."""

    def prepare(self, launch):
        return types.SimpleNamespace(captured=True, time=sum(launch()))

    def measure(self, prepared):
        return [[float(p.time)] * 20 for p in prepared]


def recorded(rows: int, times: dict[str, float]) -> GemmResults:
    def set_up(name, problem):
        if name not in times:
            raise MissingError("is not here")
        exact = problem.exact(problem.weight)
        return Setup([lambda: times[name]] * 3, 1000, exact.half(), exact)

    problem = Problem.make(64, 256, rows, "cpu")
    case = measure_case("fc", problem, ["int4", "fp8", "cublas", "tensorrt"], _Timer(), set_up)
    environment = {"saw_trtllm": "1", "commit": None, "command": "x", "date": None}
    bandwidth = Bandwidth(read_gbps=4000.0, copy_gbps=4000.0)
    return GemmResults(environment=environment, flush="x", bandwidth=bandwidth, cases=[case])


def test_a_record_says_which_limits_were_met(tmp_path):
    few = recorded(1, {"int4": 9.0, "fp8": 20.0, "cublas": 40.0})
    assert [(t.value, t.met) for t in few.cases[0].targets] == [(9.0, True), (20.0, False)]
    assert few.cases[0].missing == {"tensorrt": "is not here"}
    few.save(tmp_path / "gemm.json")
    report = load_report(tmp_path / "gemm.json")
    assert report.tables["products"][1] == ["fc, 64 x 256", "1", "9.0", "20.0", "40.0"]
    assert report.notes == ["TensorRT fp16: is not here"]
    many = recorded(2048, {"int4": 44.0, "fp8": 50.0, "cublas": 40.0})
    assert [(t.value, t.met) for t in many.cases[0].targets] == [(1.1, True), (1.25, False), (None, None)]


def test_errors_are_those_of_what_was_multiplied():
    case = recorded(8, {"int4": 1.0}).cases[0]
    assert case.products[0].error == pytest.approx(0, abs=2e-3)  # fp16's rounding


@pytest.mark.parametrize(("kind", "most"), [("int4", 0.12), ("fp8", 0.04)])
def test_weights_are_packed_as_the_kernels_take_them(kind, most):
    """The array that a GPU is given stands for the weight, to what its bits allow."""
    problem = Problem.make(128, 256, 2, "cpu")
    packed = problem.packed(kind)
    assert packed.values.shape == packed.shape.values
    unpacked = unpack_weight(kind, packed.values.numpy(), packed.scales.numpy(), tuple(problem.weight.shape))
    np.testing.assert_allclose(unpacked, packed.exact.numpy(), rtol=2**-17, atol=0)
    assert problem.with_rows(5).packed(kind) is packed, "a weight is packed once"
    assert np.abs(unpacked - problem.weight.numpy()).std() < most * problem.weight.std()


def test_rows_in_fp8():
    x = torch.randn(5, 64, generator=torch.Generator().manual_seed(0))
    codes, scales = to_fp8(x)
    assert (codes.float().abs().amax(1) == 448).all()
    # Three bits after the first, and subnormal numbers in steps of 2^-9.
    torch.testing.assert_close(codes.float() * scales, x, rtol=2**-4, atol=float(scales.max()) * 2**-10)


@pytest.mark.parametrize("kind", ["fp16", "fp8"])
def test_tensorrts_network_is_the_product(kind, monkeypatch):
    trt = fake_tensorrt.install(monkeypatch)
    runtime = types.SimpleNamespace(
        deserialize_cuda_engine=lambda plan: types.SimpleNamespace(create_execution_context=lambda: None)
    )
    monkeypatch.setattr(trt, "Runtime", lambda logger: runtime, raising=False)
    problem = Problem.make(64, 128, 3, "cpu")
    product = tensorrt_peer.Product(kind, problem.weight, problem.x)
    got = execute(fake_tensorrt.Builder.networks[-1], {"x": problem.x.float()})["y"]
    x = problem.x.float()
    if kind == "fp8":
        scale = x.abs().max() / 448
        x = (x / scale).to(torch.float8_e4m3fn).float() * scale
    weight = product.weight.float()
    bound = sum_rounding(x.shape[1], float(x.abs().max() * weight.abs().max()))
    torch.testing.assert_close(got, x @ weight.T, rtol=0, atol=bound)


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        (["--shapes", "qkv,all"], "--shapes names 'all': choose among qkv, dense"),
        (["--peers", "vllm"], "--peers names 'vllm': choose among cublas"),
        (["--rows", "1,x"], "--rows is '1,x': give numbers above 0 with commas"),
    ],
)
def test_what_cannot_be_measured(argv, words, capsys):
    assert words in rejected(capsys, main, "gemm", *argv)


@pytest.mark.gpu
@pytest.mark.parametrize("rows", [1, 64, 256])
def test_products_are_products(rows, tmp_path):
    problem = Problem.make(256, 512, rows)
    names = ["int4", "fp8", "cublas", "cublas_fp8"] + ["fp8_inputs"] * (rows > FEW_ROWS)
    case = measure_case("proj", problem, names, CudaTimer(20), set_up)
    assert case.missing == {}
    for product in case.products:
        assert product.error < (0.05 if product.contender in ("cublas_fp8", "fp8_inputs") else 0.01)
    json.loads(case.model_dump_json())
