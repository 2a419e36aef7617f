"""SawGemm on the GPU, through TensorRT's interfaces without it: against fp64 products."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

from tests.support.exactness import ROUNDING
from tests.support.plugin_library import GEMM
from tests.support.tolerance import tensor_core_rounding

#: ``[out_features, in_features]``: Llama 3 8B's qkv, dense, fc and proj, and some that no fast kernel takes.
SHAPES = [(6144, 4096), (4096, 4096), (14336, 4096), (4096, 14336), (1000, 96), (33, 18)]
ROWS = (1, 2, 15, 33, 64, 256, 999, 1000)


class Linear:
    """A layer, its weight, and a stream's workspace."""

    def __init__(self, make_plugin, shape, dtype, output_dtype):
        self.output_dtype = output_dtype
        outputs, inputs = shape
        fields = {"in_features": inputs, "out_features": outputs}
        fields["output_dtype"] = str(output_dtype).removeprefix("torch.")
        self._plugin = make_plugin(GEMM, dtype, **fields)
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
        """Rounded once, of a sum in fp32."""
        wide, weight = x.double(), self.weight.double()
        want, bound = wide @ weight.T, tensor_core_rounding(wide, weight)
        assert ((y.double() - want).abs() <= bound + ROUNDING[self.output_dtype] * (want.abs() + bound)).all()


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
