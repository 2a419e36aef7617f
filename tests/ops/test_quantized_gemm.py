"""quantized_gemm on the GPU, from Python and through TensorRT's interfaces without it: against fp64 products."""

from __future__ import annotations

import ml_dtypes
import numpy as np
import pytest
import torch

from saw_trtllm import ops
from saw_trtllm.backends.reference.quantized_input import round_input
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
@pytest.mark.parametrize(("kind", "block"), FORMATS[2:])
def test_a_multiprocessor_has_any_number_of_strips(kind, block, dtype):
    """Strips are 16 rows of the weight; the last multiprocessor has fewer, and more than seven are done in turns."""
    for strips in (1, 2, 3, 4, 5, 6, 7, 9):
        out = 16 * strips * torch.cuda.get_device_properties(0).multi_processor_count - 24
        weight = Weight(kind, block, (out, 1296))
        for rows in (1, 4, 8, 16):
            x = torch.randn(rows, 1296, dtype=dtype, device="cuda")
            weight.assert_right(x, weight(x))


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


def rounded(x):
    """By the reference, on the CPU: on a GPU PyTorch multiplies by a 448th in place of dividing by 448."""
    return round_input(x.float().cpu(), "token").cuda()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize(("rows", "width"), [(1, 16), (5, 592), (300, 4096)])
def test_rows_are_rounded_as_the_reference_rounds_them(rows, width, dtype):
    x = torch.randn(rows, width, dtype=dtype, device="cuda") * torch.rand(rows, 1, device="cuda").to(dtype)
    x[rows // 2] = 0
    values = torch.full((rows + 1, width), 0x55, dtype=torch.uint8, device="cuda")
    scales = torch.full((rows,), torch.nan, device="cuda")
    ops.quantize_rows(x, values=values[:rows], scales=scales, stream=torch.cuda.current_stream())
    numbers = values[:rows].view(torch.float8_e4m3fn).float() * scales[:, None]
    assert torch.equal(numbers, rounded(x))
    assert (values[rows] == 0x55).all()


def test_a_weight_is_unpacked_as_it_was():
    shape = _, inputs = 200, 592
    weight = Weight("fp8", (1, inputs), shape)
    for first, rows in ((0, 200), (64, 100), (192, 8)):
        values = torch.full((rows + 1, inputs), 0x55, dtype=torch.uint8, device="cuda")
        scales = torch.full((rows,), torch.nan, device="cuda")
        into = {"row_values": values[:rows], "row_scales": scales, "stream": torch.cuda.current_stream()}
        ops.unpack_rows(*weight.arrays, packed=weight.packed, first_row=first, **into)
        numbers = values[:rows].view(torch.float8_e4m3fn).float() * scales[:, None]
        assert torch.equal(numbers, weight.exact[first : first + rows])
        assert (values[rows] == 0x55).all()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("shape", [(208, 592), (4096, 4096)], ids=str)
def test_the_plugin_multiplies_many_rows_in_8_bits(shape, dtype, make_plugin):
    """What each row is rounded to is compressed-tensors' dynamic scale for a token, as the reference has it."""
    out, inputs = shape
    weight = Weight("fp8", (1, inputs), shape)
    fields = {"in_features": inputs, "out_features": out, "weight_type": "fp8", "group_size": 128}
    plugin = make_plugin(QUANTIZED_GEMM, dtype, **fields, quantize_input=1)
    workspace = torch.empty(plugin.workspace_bytes(), dtype=torch.uint8, device="cuda")
    for rows in (1, 192, 193, 1000):
        x = torch.randn(rows, inputs, dtype=dtype, device="cuda") * torch.rand(rows, 1, device="cuda").to(dtype)
        x[rows // 2] = 0
        y = torch.full((rows, out), torch.nan, dtype=dtype, device="cuda")
        bound = [(t.data_ptr(), list(t.shape)) for t in (x, *weight.arrays)]
        stream = torch.cuda.current_stream().cuda_stream
        assert plugin.enqueue(bound, [y.data_ptr()], workspace.data_ptr(), stream) == 0
        if rows <= 192:
            assert torch.equal(y, weight(x))
            continue
        if torch.cuda.get_device_capability()[0] != 9:
            pytest.skip("cuBLASLt has no product with scales of rows on this GPU")
        wide, exact = rounded(x).double(), weight.exact.double()
        want, size = wide @ exact.T, wide.abs() @ exact.abs().T
        # Of a step's 32 products tensor cores keep 13 bits after the largest's first.
        assert ((y.double() - want).abs() <= 2**-11 * size + ROUNDING[dtype] * want.abs()).all()


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
