"""One run: each contender's product is set up, checked against fp32, and all are timed in turn."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from statistics import quantiles
from typing import Any

import numpy as np
import torch

from benchmarks.common.environment import describe
from benchmarks.common.target import Limit, TargetResult
from benchmarks.gemm import tensorrt_peer
from benchmarks.gemm.record import LIMITS, MANY_LIMIT, MANY_ROWS, SHAPES, GemmResults, Product, ProductCase
from benchmarks.kernels.run import MissingError, Timer
from benchmarks.kernels.timing import FLUSH, CudaTimer, measure_bandwidth
from saw_trtllm import ops
from saw_trtllm.errors import BackendUnavailableError, SawError
from saw_trtllm.model.quantization import QuantizedWeight, WeightFormat, quantize
from saw_trtllm.ops.arrays import kernels
from saw_trtllm.ops.quantized_gemm import PackedShape

#: Of the weights: an 8B Llama's lie about so far from 0.
STANDARD_DEVIATION = 0.02
#: Launches in a graph, as an engine's layers follow each other.
CHAIN = 12
#: Of copies of a weight that take turns, so that L2 holds none of it when its turn comes again.
COLD_BYTES = 192 << 20
#: Rows above which a product dequantizes the weight and is cuBLAS's, as the plugin's is.
FEW_ROWS = 192


@dataclass
class Setup:
    """What a contender runs.

    Attributes
    ----------
    launches : sequence of callable
        That follow each other in one graph.
    bytes : int
        That a launch must move, at least.
    result : torch.Tensor
        What a launch writes.
    exact : torch.Tensor
        The product in fp32 of the weight that it multiplies by.
    """

    launches: Sequence[Callable[[], Any]]
    bytes: int
    result: torch.Tensor
    exact: torch.Tensor


@dataclass(frozen=True)
class Packed:
    """A quantized weight on the GPU, as the kernels take it, and in fp32."""

    shape: PackedShape
    values: torch.Tensor
    scales: torch.Tensor
    exact: torch.Tensor

    @classmethod
    def of(cls, weight: torch.Tensor, kind: str) -> Packed:
        """A weight in one of our formats."""
        made = quantized(weight, kind)
        arrays = ops.pack_weight(kind, made.values, made.scales, made.zeros, made.format.block)
        values, scales, exact = (torch.from_numpy(array).to(weight.device) for array in (*arrays, made.dequantize()))
        return cls(PackedShape.of(kind, made.shape, made.format.block[1]), values, scales, exact)

    @property
    def nbytes(self) -> int:
        """That a product reads."""
        return self.values.nbytes + self.scales.nbytes


@dataclass
class Problem:
    """A weight ``[out, in]`` and rows of activations in fp16, and what their product is."""

    weight: torch.Tensor
    x: torch.Tensor
    _packed: dict[str, Packed] = field(default_factory=dict)

    @classmethod
    def make(cls, out: int, inputs: int, rows: int, device: str = "cuda") -> Problem:
        """Normal numbers."""
        rng = torch.Generator(device).manual_seed(out + inputs)
        weight = torch.empty(out, inputs, device=device).normal_(std=STANDARD_DEVIATION, generator=rng)
        return cls(weight, torch.empty(0)).with_rows(rows)

    def with_rows(self, rows: int) -> Problem:
        """The same weight, which is packed once, with so many rows."""
        device, inputs = self.weight.device, self.weight.shape[1]
        rng = torch.Generator(device).manual_seed(rows)
        x = torch.empty(rows, inputs, dtype=torch.float16, device=device).normal_(generator=rng)
        return Problem(self.weight, x, self._packed)

    def packed(self, kind: str) -> Packed:
        """The weight in one of our formats."""
        if kind not in self._packed:
            self._packed[kind] = Packed.of(self.weight, kind)
        return self._packed[kind]

    def exact(self, weight: torch.Tensor) -> torch.Tensor:
        """Its product with another weight, in fp32."""
        return self.x.float() @ weight.float().T

    @property
    def io_bytes(self) -> int:
        """Of activations and result."""
        return 2 * len(self.x) * (self.weight.shape[0] + self.weight.shape[1])


def chained(launch: Callable[..., Any], *weight: torch.Tensor) -> list[Callable[[], Any]]:
    """Launches that follow each other, each with a copy of the weight that L2 does not hold."""
    size = sum(array.nbytes for array in weight)
    copies = [weight, *([a.clone() for a in weight] for _ in range(min(CHAIN, -(-COLD_BYTES // size)) - 1))]
    return [partial(launch, *copies[i % len(copies)]) for i in range(CHAIN)]


FORMATS = {
    "int4": lambda inputs: WeightFormat(kind="int4", block=(1, 128), zeros=True, scale_dtype="float16"),
    "fp8": lambda inputs: WeightFormat(kind="fp8", block=(1, inputs)),
}
OURS = (*FORMATS, "fp8_inputs")


def quantized(weight: torch.Tensor, kind: str) -> QuantizedWeight:
    """In one of our formats, rounded to the nearest."""
    return quantize(weight.cpu().numpy(), FORMATS[kind](weight.shape[1]))


def ours(problem: Problem, kind: str) -> Setup:
    """The kernels of ``SawQuantizedGemm``: of few rows in one, of many after the weight is dequantized."""
    weight, x = problem.packed(kind), problem.x
    y = torch.empty(len(x), len(problem.weight), dtype=x.dtype, device=x.device)
    dense = torch.empty_like(problem.weight, dtype=x.dtype) if len(x) > FEW_ROWS else None

    def launch(values: torch.Tensor, scales: torch.Tensor) -> None:
        stream = torch.cuda.current_stream()
        if dense is None:
            ops.quantized_gemm(x, values, scales, packed=weight.shape, y=y, stream=stream)
        else:
            ops.dequantize(values, scales, packed=weight.shape, y=dense, stream=stream)
            torch.mm(x, dense.T, out=y)

    launches = chained(launch, weight.values, weight.scales)
    return Setup(launches, weight.nbytes + problem.io_bytes, y, problem.exact(weight.exact))


def ours_in_float8(problem: Problem) -> Setup:
    """Many rows as ``SawQuantizedGemm`` multiplies them in 8 bits, but to bfloat16, which alone PyTorch allows."""
    x, (out, inputs) = problem.x, problem.weight.shape
    if len(x) <= FEW_ROWS:
        raise MissingError(f"up to {FEW_ROWS} rows are multiplied in 16 bits")
    weight = problem.packed("fp8")
    of_x, of_weight = (torch.empty(n, inputs, dtype=torch.uint8, device=x.device) for n in (len(x), out))
    x_scales, weight_scales = (torch.empty(n, device=x.device) for n in (len(x), out))
    y = torch.empty(len(x), out, dtype=torch.bfloat16, device=x.device)
    codes, rows = (array.view(torch.float8_e4m3fn) for array in (of_x, of_weight))

    def launch(values: torch.Tensor, scales: torch.Tensor) -> None:
        stream = torch.cuda.current_stream()
        into = {"row_values": of_weight, "row_scales": weight_scales}
        ops.unpack_rows(values, scales, packed=weight.shape, **into, stream=stream)
        ops.quantize_rows(x, values=of_x, scales=x_scales, stream=stream)
        torch._scaled_mm(codes, rows.T, x_scales[:, None], weight_scales[None], out_dtype=y.dtype, out=y)

    launch(weight.values, weight.scales)
    exact = (codes.float() * x_scales[:, None]) @ weight.exact.T
    launches = chained(launch, weight.values, weight.scales)
    return Setup(launches, weight.nbytes + problem.io_bytes, y, exact)


def cublas(problem: Problem) -> Setup:
    """PyTorch's product in fp16, which is cuBLAS's."""
    weight, y = (
        problem.weight.half(),
        torch.empty(len(problem.x), len(problem.weight), dtype=torch.float16, device="cuda"),
    )
    return Setup(
        chained(lambda weight: torch.mm(problem.x, weight.T, out=y), weight),
        weight.numel() * 2 + problem.io_bytes,
        y,
        problem.exact(weight),
    )


def cublas_fp8(problem: Problem) -> Setup:
    """PyTorch's product of two FP8 matrices with a scale for each token and output channel.

    Its activations are quantized before, which is not timed. The exact product is of what was rounded.
    """
    codes, scales = to_fp8(problem.x)
    weight, weight_scales = to_fp8(problem.weight)
    y = torch.empty(len(codes), len(weight), dtype=torch.bfloat16, device="cuda")  # the only one that rows allow

    def launch(weight: torch.Tensor) -> None:
        torch._scaled_mm(codes, weight.T, scales, weight_scales.T, out_dtype=torch.bfloat16, out=y)

    exact = (codes.float() * scales) @ (weight.float() * weight_scales).T
    return Setup(chained(launch, weight), weight.numel() + codes.numel() + y.numel() * 2, y, exact)


def to_fp8(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Rows in e4m3, and their scales ``[rows, 1]``."""
    scales = x.float().abs().amax(1, keepdim=True) / 448
    return (x.float() / scales).to(torch.float8_e4m3fn), scales


def set_up(name: str, problem: Problem) -> Setup:
    """A contender on a problem; raises :class:`MissingError` or :class:`SawError` if it cannot."""
    if name in FORMATS:
        return ours(problem, name)
    if name == "fp8_inputs":
        return ours_in_float8(problem)
    if name == "cublas":
        return cublas(problem)
    if name == "cublas_fp8":
        return cublas_fp8(problem)
    engine = tensorrt_peer.Product(name.removeprefix("tensorrt").lstrip("_") or "fp16", problem.weight, problem.x)
    # Its weight is a part of the engine: it runs alone, with nothing of it in L2.
    return Setup([engine.launch], engine.weight_bytes + problem.io_bytes, engine.result, problem.exact(engine.weight))


def run_gemm(
    shapes: Sequence[str], rows: Sequence[int], peers: Sequence[str], command: str, commit: str | None
) -> GemmResults:
    """Measure products on the current GPU.

    Parameters
    ----------
    shapes : sequence of str
        Of :data:`~benchmarks.gemm.record.SHAPES`.
    rows : sequence of int
    peers : sequence of str
        Of :data:`~benchmarks.gemm.record.PEERS`.
    command : str
        As it was typed.
    commit : str, optional
        For a tree without its git repository.

    Raises
    ------
    SawError
        If there is no GPU, or the kernels are not built.
    """
    if not torch.cuda.is_available():
        raise BackendUnavailableError("PyTorch sees no CUDA GPU: products are measured on one; check nvidia-smi")
    kernels()
    timer = CudaTimer()
    environment = describe(
        command,
        commit,
        gpu=torch.cuda.get_device_name(),
        cuda=torch.version.cuda,
        torch=torch.__version__,
        tensorrt=tensorrt_peer.version() if any(p.startswith("tensorrt") for p in peers) else None,
    )
    bandwidth, cases = measure_bandwidth(timer), []
    for shape in shapes:
        problem = Problem.make(*SHAPES[shape], 1)
        for n in rows:
            cases.append(measure_case(shape, problem.with_rows(n), [*OURS, *peers], timer, set_up))
            torch.cuda.empty_cache()
    return GemmResults(environment=environment, flush=FLUSH, bandwidth=bandwidth, cases=cases)


def measure_case(
    shape: str,
    problem: Problem,
    contenders: Sequence[str],
    timer: Timer,
    set_up: Callable[[str, Problem], Setup],
) -> ProductCase:
    """Time a case's contenders in turn."""
    ready, missing = [], {}
    for name in contenders:
        try:
            setup = set_up(name, problem)
            ready.append((name, setup, timer.prepare(partial(_launch_all, setup.launches))))
        except (MissingError, SawError, RuntimeError) as e:
            missing[name] = str(e).splitlines()[0]
    times = timer.measure([prepared for *_, prepared in ready])
    products = [_product(name, setup, p, sample) for (name, setup, p), sample in zip(ready, times, strict=True)]
    out, inputs = problem.weight.shape
    case = ProductCase(
        name=shape,
        out_features=out,
        in_features=inputs,
        rows=len(problem.x),
        products=products,
        missing=missing,
        targets=[],
    )
    return case.model_copy(update={"targets": targets(case)})


def targets(case: ProductCase) -> list[TargetResult]:
    """The limits of a case, and whether they were met."""
    found = []
    for (name, rows), limit in LIMITS.items():
        if case.name == "fc" and case.rows == rows:
            p = case.find(name)
            found.append(Limit(limit, least=False).judge(f"{name} at most {limit} µs", p and p.median_us, "µs"))
    dense = case.find("cublas")
    for name in OURS if case.rows == MANY_ROWS else ():
        p = case.find(name)
        value = p.median_us / dense.median_us if p and dense else None
        found.append(Limit(MANY_LIMIT, least=False).judge(f"{name} at most {MANY_LIMIT}x cuBLAS's fp16", value, "x"))
    return found


def _launch_all(launches: Sequence[Callable[[], Any]]) -> list[Any]:
    return [launch() for launch in launches]


def _product(name: str, setup: Setup, prepared: Any, sample: list[float]) -> Product:
    count = len(setup.launches)
    sample = [time / count for time in sample]
    low, *_, high = quantiles(sample, n=10)
    median = float(np.median(sample))
    error = (setup.result.float() - setup.exact).abs().max() / setup.exact.std()
    return Product(
        contender=name,
        median_us=round(median, 3),
        p10_us=round(low, 3),
        p90_us=round(high, 3),
        repetitions=len(sample),
        chained=count,
        cuda_graph=prepared.captured,
        bytes=setup.bytes,
        gbps=round(setup.bytes / median / 1e3, 1),
        error=round(float(error), 5),
    )
