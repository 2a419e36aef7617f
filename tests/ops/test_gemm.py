"""gemm on the GPU, from Python and, with cuBLASLt, as SawGemm through TensorRT's interfaces: against fp64 products."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

from saw_trtllm import ops
from saw_trtllm.errors import KernelError
from tests.support.exactness import ROUNDING
from tests.support.plugin_library import GEMM
from tests.support.tolerance import tensor_core_rounding

#: ``[out_features, in_features]``: Llama 3 8B's qkv, dense, fc and proj, and some that no fast kernel takes.
SHAPES = [(6144, 4096), (4096, 4096), (14336, 4096), (4096, 14336), (1000, 96), (33, 18)]
ROWS = (1, 2, 8, 9, 16, 17, 64, 256, 999, 1000)


class Linear:
    """A layer, its weight and maybe its gate, and a stream's workspace."""

    def __init__(self, make_plugin, shape, dtype, output_dtype, gated=False):
        self.output_dtype = output_dtype
        outputs, inputs = shape
        fields = {"in_features": inputs, "out_features": outputs, "use_gate": int(gated)}
        fields["output_dtype"] = str(output_dtype).removeprefix("torch.")
        self._plugin = make_plugin(GEMM, dtype, **fields)
        self.weights = [torch.randn(shape, dtype=dtype, device="cuda") for _ in range(1 + gated)]
        self.workspace = torch.empty(self._plugin.workspace_bytes(), dtype=torch.uint8, device="cuda")

    def enqueue(self, x, y):
        bound = [(t.data_ptr(), list(t.shape)) for t in (x, *self.weights)]
        stream = torch.cuda.current_stream().cuda_stream
        assert self._plugin.enqueue(bound, [y.data_ptr()], self.workspace.data_ptr(), stream) == 0

    def __call__(self, x):
        self.workspace.random_(256)
        y = torch.full((len(x), len(self.weights[0])), torch.nan, dtype=self.output_dtype, device="cuda")
        self.enqueue(x, y)
        return y

    def assert_right(self, x, y):
        """Rounded once, of a sum in fp32, and with a gate once more.

        SiLU's slope is at most 1.1, and it is computed to within 1e-5 of itself.
        """
        wide, rounding = x.double(), ROUNDING[self.output_dtype]
        (want, bound), *gate = [
            (wide @ weight.double().T, tensor_core_rounding(wide, weight.double())) for weight in self.weights
        ]
        for other, others_bound in gate:
            silu = torch.nn.functional.silu(want)
            bound = 1.1 * (bound + rounding * want.abs()) + 1e-5 * silu.abs()
            others_bound = others_bound + rounding * other.abs()
            bound = bound * (other.abs() + others_bound) + others_bound * silu.abs()
            want = silu * other
        # The smallest numbers of float16 lie 2^-24 apart.
        assert ((y.double() - want).abs() <= bound + rounding * (want.abs() + bound) + 2**-24).all()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("wide", [False, True], ids=["16 bits", "fp32"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_products_are_right(shape, wide, dtype, make_plugin):
    layer = Linear(make_plugin, shape, dtype, torch.float32 if wide else dtype)
    for rows in ROWS:
        x = torch.randn(rows, shape[1], dtype=dtype, device="cuda")
        y = layer(x)
        layer.assert_right(x, y)
        assert torch.equal(layer(x), y)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("shape", [(14336, 4096), (1000, 96), (33, 18)], ids=str)
def test_gated_products_are_right(shape, dtype, make_plugin):
    """Of few rows in one kernel; of many, the last time in two parts, by cuBLASLt."""
    layer = Linear(make_plugin, shape, dtype, dtype, gated=True)
    for rows in (*ROWS, *[5000] * (shape[0] == 14336)):
        x = torch.randn(rows, shape[1], dtype=dtype, device="cuda") / 16
        y = layer(x)
        some = slice(None, None, max(rows // 500, 1))  # fp64 takes eight times y's memory
        layer.assert_right(x[some], y[some])
        assert torch.equal(layer(x), y)


@pytest.fixture
def few_rows():
    """Whether the GPU's code has kernels of our own for few rows, which is compiled for Hopper alone."""
    x, weight, y = (torch.zeros(n, 8, dtype=torch.float16, device="cuda") for n in (1, 8, 1))
    try:
        ops.gemm(x, weight, y=y, stream=torch.cuda.current_stream())
    except KernelError as error:
        if "cudaErrorNoKernelImageForDevice" not in str(error):
            raise
        pytest.skip(f"products of few rows are cuBLASLt's here: {error}")


@pytest.mark.usefixtures("few_rows")
def test_the_operation_is_the_plugin_s(make_plugin):
    for gated in (False, True):
        layer = Linear(make_plugin, (1000, 96), torch.float16, torch.float16, gated)
        x = torch.randn(13, 96, dtype=torch.float16, device="cuda")
        y = torch.full((13, 1000), torch.nan, dtype=torch.float16, device="cuda")
        weight, gate = (*layer.weights, None)[:2]
        ops.gemm(x, weight, gate=gate, y=y, stream=torch.cuda.current_stream())
        assert torch.equal(y, layer(x))


@pytest.mark.usefixtures("few_rows")
def test_kernels_that_begin_early_wait_for_what_they_read():
    """A chain of launches in one graph, each of which may begin before the last has ended, is one of single launches.

    Buffers are used again two layers later, as TensorRT does: what writes there must wait for what reads.
    """
    rng = torch.Generator("cuda").manual_seed(3)
    width, inner, rows, layers = 2048, 4096, 3, 6

    def normal(*shape):
        return torch.empty(*shape, dtype=torch.float16, device="cuda").normal_(generator=rng)

    weights = [[normal(inner, width) / 45, normal(inner, width) / 45, normal(width, inner) / 64] for _ in range(layers)]
    ones = torch.ones(1, width, device="cuda")
    x, *sums, h, mlp = (normal(rows, n) for n in (width, width, width, width, inner))
    added = torch.zeros(rows, width, dtype=torch.float16, device="cuda")
    written = (*sums, added, h, mlp)

    def run(pause=lambda: None):
        stream = torch.cuda.current_stream()
        before = x
        added.zero_()
        for i, (fc, gate, proj) in enumerate(weights):
            total = sums[i % 2]
            norm = {"residual": added[:, None], "sum_out": total[:, None], "y": h[:, None], "epsilon": 1e-5}
            ops.rms_norm(before[:, None], ones, **norm, stream=stream)
            pause()
            ops.gemm(h, fc, gate=gate, y=mlp, stream=stream)
            pause()
            ops.gemm(mlp, proj, y=added, stream=stream)
            pause()
            before = total

    run()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        run()
    for _ in range(20):
        x.normal_(generator=rng)
        run(torch.cuda.synchronize)
        want = [t.clone() for t in written]
        for t in written:
            t.fill_(torch.nan)
        graph.replay()
        assert all(torch.equal(*pair) for pair in zip(written, want, strict=True))


def test_a_captured_graph(make_plugin):
    layer = Linear(make_plugin, (4096, 14336), torch.float16, torch.float16)
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


def test_threads_share_a_handle(make_plugin):
    layers = [Linear(make_plugin, (512, 256), torch.float16, torch.float16) for _ in range(4)]

    def run(layer):
        with torch.cuda.stream(torch.cuda.Stream()):
            for rows in range(1, 60):
                x = torch.randn(rows, 256, dtype=torch.float16, device="cuda")
                layer.assert_right(x, layer(x))
        return True

    torch.cuda.synchronize()
    with ThreadPoolExecutor(4) as pool:
        assert all(pool.map(run, layers))
