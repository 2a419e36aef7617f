"""quantized_gemm on the GPU, from Python and through TensorRT's interfaces without it: against fp64 products."""

from __future__ import annotations

import ml_dtypes
import numpy as np
import pytest
import torch

from saw_trtllm import ops
from saw_trtllm.model.quantization import QuantizedWeight, WeightFormat
from tests.support.exactness import ROUNDING
from tests.support.plugin_library import QUANTIZED_GEMM
from tests.support.tolerance import tensor_core_rounding

#: Kind, and rows and columns that share a scale.
FORMATS = [("int4", (1, 32)), ("int4", (1, 64)), ("int4", (1, 128)), ("fp8", (128, 128))]
#: ``[out, in]``: Llama 3 8B's dense and proj, and some that fill no block.
SHAPES = [(4096, 4096), (4096, 14336), (576, 1536), (200, 592), (8, 16)]
ROWS = (1, 3, 8, 9, 16, 31, 33, 64, 65, 192)


class Weight:
    """A random quantized weight, packed and on the GPU, and what it stands for in float32."""

    def __init__(self, kind, block, shape):
        rng = np.random.default_rng(4)
        format = WeightFormat(kind=kind, block=block, zeros=kind == "int4", scale_dtype="float16")
        grid = format.grid(shape)
        values = rng.integers(0, 16, shape, np.uint8)
        if kind == "fp8":
            values = rng.standard_normal(shape, np.float32).astype(ml_dtypes.float8_e4m3fn)
        scales = rng.uniform(0.5, 2, grid).astype(np.float16)
        zeros = rng.integers(0, 17, grid, np.uint8) if kind == "int4" else None
        self.packed = ops.PackedShape.of(kind, shape, block[1])
        self.arrays = [torch.from_numpy(x).cuda() for x in ops.pack_weight(kind, values, scales, zeros, block)]
        self.exact = torch.from_numpy(QuantizedWeight(format, values, scales, zeros).dequantize()).cuda()

    def __call__(self, x):
        y = torch.full((len(x), self.packed.out_features), torch.nan, dtype=x.dtype, device="cuda")
        ops.quantized_gemm(x, *self.arrays, packed=self.packed, y=y, stream=torch.cuda.current_stream())
        return y

    def assert_right(self, x, y):
        """Rounded once, of exact products summed in fp32."""
        assert_product(y, x, self.exact)


def assert_product(y, x, weight):
    """``x · weightᵀ``, summed in fp32 and rounded once."""
    x, weight = x.double(), weight.double()
    want, bound = x @ weight.T, tensor_core_rounding(x, weight)
    assert ((y.double() - want).abs() <= bound + ROUNDING[y.dtype] * (want.abs() + bound)).all()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize(("kind", "block"), FORMATS)
def test_products_are_right(kind, block, shape, dtype):
    weight = Weight(kind, block, shape)
    for rows in ROWS:
        x = torch.randn(rows, shape[1], dtype=dtype, device="cuda")
        y = weight(x)
        weight.assert_right(x, y)
        assert torch.equal(weight(x), y)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize(("kind", "block"), FORMATS)
def test_a_dequantized_weight_is_rounded_once(kind, block, dtype):
    weight = Weight(kind, block, (200, 592))
    for first, rows in ((0, 200), (64, 100), (192, 8)):
        y = torch.full((rows + 1, 592), torch.nan, dtype=dtype, device="cuda")
        stream = torch.cuda.current_stream()
        ops.dequantize(*weight.arrays, packed=weight.packed, first_row=first, y=y[:rows], stream=stream)
        assert torch.equal(y[:rows], weight.exact[first : first + rows].to(dtype))
        assert y[rows].isnan().all()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize(("kind", "block"), FORMATS)
def test_the_plugin_multiplies_any_number_of_rows(kind, block, dtype, make_plugin):
    """Few by the weight as it is, many by the weight in 16 bits."""
    weight = Weight(kind, block, (200, 592))
    fields = {"in_features": 592, "out_features": 200, "weight_type": kind, "group_size": weight.packed.group}
    plugin = make_plugin(QUANTIZED_GEMM, dtype, **fields)
    workspace = torch.empty(plugin.workspace_bytes(), dtype=torch.uint8, device="cuda")
    for rows in (1, 64, 192, 193, 1000):
        x = torch.randn(rows, 592, dtype=dtype, device="cuda")
        y = torch.full((rows, 200), torch.nan, dtype=dtype, device="cuda")
        bound = [(t.data_ptr(), list(t.shape)) for t in (x, *weight.arrays)]
        stream = torch.cuda.current_stream().cuda_stream
        assert plugin.enqueue(bound, [y.data_ptr()], workspace.data_ptr(), stream) == 0
        if rows <= 192:
            assert torch.equal(y, weight(x))
        else:
            assert_product(y, x, weight.exact.to(dtype))


def test_a_captured_graph():
    """The next product begins before the last one has ended, and waits for what it reads."""
    first, second = Weight("int4", (1, 128), (4096, 4096)), Weight("fp8", (128, 128), (4096, 4096))
    x = torch.randn(16, 4096, dtype=torch.float16, device="cuda") / 64
    middle = first(x)
    y = second(middle)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for _ in range(3):
            stream = torch.cuda.current_stream()
            ops.quantized_gemm(x, *first.arrays, packed=first.packed, y=middle, stream=stream)
            ops.quantized_gemm(middle, *second.arrays, packed=second.packed, y=y, stream=stream)
    for _ in range(3):
        x.normal_().div_(64)
        graph.replay()
        first.assert_right(x, middle)
        second.assert_right(middle, y)
