"""SawGemm and the small plugins on the GPU, through TensorRT's interfaces without it: against fp64 products."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import plugin_library as lib
import pytest
import torch
from plugin_library import GEMM, LOOKUP, RMS_NORM, SILU_MUL

from saw_trtllm.plugins.library import load_cublas_lt

#: ``[out_features, in_features]``: Llama 3 8B's qkv, dense, fc and proj, and some that no fast kernel takes.
SHAPES = [(6144, 4096), (4096, 4096), (14336, 4096), (4096, 14336), (1000, 96), (33, 18)]
ROWS = (1, 2, 15, 33, 64, 256, 999, 1000)
ROUNDING = {torch.float16: 2**-11, torch.bfloat16: 2**-8, torch.float32: 0.0}


@pytest.fixture
def make(creators, driver):
    if not load_cublas_lt():
        pytest.skip("there is no cuBLASLt")

    def make_(name, dtype, **fields):
        if dtype == torch.bfloat16 and driver.TENSORRT[0] < 10:
            pytest.skip("TensorRT 8.6 has no bfloat16")
        driver.take_messages()
        plugin = creators[name].create(lib.to_fields({"dtype": str(dtype).removeprefix("torch."), **fields}))
        return creators[name].deserialize(plugin.serialized()).attach_to_context()

    return make_


class Linear:
    """A layer, its weight, and a stream's workspace."""

    def __init__(self, make, shape, dtype, output_dtype):
        self.output_dtype = output_dtype
        outputs, inputs = shape
        fields = {"in_features": inputs, "out_features": outputs}
        fields["output_dtype"] = str(output_dtype).removeprefix("torch.")
        self._plugin = make(GEMM, dtype, **fields)
        self.weight = torch.randn(shape, dtype=dtype, device="cuda")
        self.workspace = torch.empty(self._plugin.workspace_bytes(), dtype=torch.uint8, device="cuda")

    def enqueue(self, x, y):
        bound = [(t.data_ptr(), list(t.shape)) for t in (x, self.weight)]
        stream = torch.cuda.current_stream().cuda_stream
        assert self._plugin.enqueue(bound, [y.data_ptr()], self.workspace.data_ptr(), stream) == 0

    def __call__(self, x):
        self.workspace.random_(256)
        y = torch.full((len(x), len(self.weight)), torch.nan, dtype=self.output_dtype, device="cuda")
        self.enqueue(x, y)
        return y

    def assert_right(self, x, y):
        """Rounded once, of a sum in fp32: one in fp16 has an error of 1e-5 of the sum of its parts' sizes and more."""
        wide, weight = x.double(), self.weight.double()
        want, size = wide @ weight.T, wide.abs() @ weight.abs().T
        assert ((y.double() - want).abs() <= 4e-6 * size + ROUNDING[self.output_dtype] * want.abs()).all()


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(7)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("wide", [False, True], ids=["16 bits", "fp32"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_products_are_right(shape, wide, dtype, make):
    layer = Linear(make, shape, dtype, torch.float32 if wide else dtype)
    for rows in ROWS:
        x = torch.randn(rows, shape[1], dtype=dtype, device="cuda")
        y = layer(x)
        layer.assert_right(x, y)
        assert torch.equal(layer(x), y)


def test_a_captured_graph(make):
    layer = Linear(make, (4096, 14336), torch.float16, torch.float16)
    x = torch.randn(64, 14336, dtype=torch.float16, device="cuda")
    y = layer(x)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        layer.enqueue(x, y)
    for _ in range(3):
        x.normal_()
        layer.workspace.random_(256)
        graph.replay()
        layer.assert_right(x, y)


def test_threads_share_a_handle(make):
    layers = [Linear(make, (512, 256), torch.float16, torch.float16) for _ in range(4)]

    def run(layer):
        with torch.cuda.stream(torch.cuda.Stream()):
            for rows in range(1, 60):
                x = torch.randn(rows, 256, dtype=torch.float16, device="cuda")
                layer.assert_right(x, layer(x))
        return True

    torch.cuda.synchronize()
    with ThreadPoolExecutor(4) as pool:
        assert all(pool.map(run, layers))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("width", [4096, 18])
def test_rows_of_a_table(width, dtype, make):
    """Those that are not there are zeros."""
    plugin = make(LOOKUP, dtype, vocab_size=300, hidden_size=width)
    table = torch.randn(300, width, dtype=dtype, device="cuda")
    rows = torch.tensor([0, 299, 7, 7, -1, 300, 150], dtype=torch.int32, device="cuda")
    y = torch.full((len(rows), width), torch.nan, dtype=dtype, device="cuda")
    stream = torch.cuda.current_stream().cuda_stream
    bound = [(t.data_ptr(), list(t.shape)) for t in (rows, table)]
    assert plugin.enqueue(bound, [y.data_ptr()], 0, stream) == 0
    want = table[rows.clamp(0, 299).long()]
    want[4:6] = 0
    assert torch.equal(y, want)


@pytest.fixture
def run(make):
    """Outputs of one of the small plugins, by tensors."""

    def run_(name, dtype, inputs, num_outputs=1, **fields):
        plugin = make(name, dtype, **fields)
        outputs = [torch.full_like(inputs[0], torch.nan) for _ in range(num_outputs)]
        bound = [(t.data_ptr(), list(t.shape)) for t in inputs]
        stream = torch.cuda.current_stream().cuda_stream
        assert plugin.enqueue(bound, [y.data_ptr() for y in outputs], 0, stream) == 0
        return outputs

    return run_


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("residual", [False, True], ids=["alone", "residual"])
@pytest.mark.parametrize("width", [4096, 14336, 96, 18])
def test_norms(width, residual, dtype, run):
    x, added = (torch.randn(2, 77, width, device="cuda") * 3).to(dtype)
    weight = torch.randn(1, width, device="cuda")
    inputs, fields = [x, weight, *[added] * residual], {"hidden_size": width, "use_residual": int(residual)}
    y, *sums = run(RMS_NORM, dtype, inputs, 1 + residual, epsilon=1e-3, **fields)
    if residual:
        x = x + added
        assert torch.equal(sums[0], x)
    wide = x.double()
    want = wide / (wide.square().mean(1, keepdim=True) + 1e-3).sqrt() * weight.double()
    assert ((y.double() - want).abs() <= (ROUNDING[dtype] + 1e-6) * want.abs() + 1e-7).all()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_norms_of_heads(dtype, run):
    """As Qwen3 has them of Q and K: V stays as it is."""
    x, weight = torch.randn(50, 6, 128, device="cuda").to(dtype), torch.randn(5, 128, device="cuda")
    inputs, fields = [x.flatten(1), weight], {"hidden_size": 128, "num_heads": 6, "num_normed": 5}
    (y,) = run(RMS_NORM, dtype, inputs, epsilon=1e-5, **fields)
    assert torch.equal(y[:, 5 * 128 :], x[:, 5])
    wide = x[:, :5].double()
    want = (wide / (wide.square().mean(2, keepdim=True) + 1e-5).sqrt() * weight.double()).flatten(1)
    assert ((y[:, : 5 * 128].double() - want).abs() <= (ROUNDING[dtype] + 1e-6) * want.abs() + 1e-7).all()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize(("rows", "width"), [(64, 14336), (3, 33)])
def test_gates(rows, width, dtype, run):
    x, gate = (torch.randn(2, rows, width, device="cuda") * 5).to(dtype)
    x[0, :4] = torch.tensor([-100, 0, 100, -8], dtype=dtype)
    (y,) = run(SILU_MUL, dtype, [x, gate], hidden_size=width)
    want = torch.nn.functional.silu(x.double()) * gate.double()
    assert ((y.double() - want).abs() <= (ROUNDING[dtype] + 1e-5) * want.abs() + 1e-7).all()
