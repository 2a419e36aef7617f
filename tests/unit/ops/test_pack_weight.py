"""Packing quantized weights: what the kernels read is what was packed, whatever does not fill a block."""

from __future__ import annotations

import re

import ml_dtypes
import numpy as np
import pytest

from saw_trtllm import ops
from saw_trtllm.errors import OpError
from saw_trtllm.model.quantization import QuantizedWeight, WeightFormat
from tests.support.packed_weights import unpack_weight

CASES = [
    ("int4", (64, 128), (1, 128), True),
    ("int4", (72, 144), (1, 32), True),
    ("int4", (72, 144), (1, 144), True),
    ("int4", (136, 576), (1, 64), False),
    ("int4", (8, 512), (1, 256), True),
    ("fp8", (72, 144), (1, 144), False),
    ("fp8", (328, 400), (128, 128), False),
]


@pytest.mark.parametrize(("kind", "shape", "block", "zeros"), CASES)
def test_packed_weights_are_exact(kind, shape, block, zeros):
    rng = np.random.default_rng(2)
    format = WeightFormat(kind=kind, block=block, zeros=zeros, scale_dtype="float16")
    grid = format.grid(shape)
    values = rng.integers(0, 16, shape, np.uint8) if kind == "int4" else rng.normal(size=shape)
    values = values if kind == "int4" else values.astype(ml_dtypes.float8_e4m3fn)
    scales = np.exp(rng.uniform(-16, 8, grid)).astype(np.float16)  # subnormal ones among them
    points = rng.integers(0, 17, grid, np.uint8) if zeros else None
    packed = ops.PackedShape.of(kind, shape, block[1])
    arrays = ops.pack_weight(kind, values, scales, points, block)
    assert [(x.shape, x.dtype.name) for x in arrays] == [(packed.values, "int32"), (packed.scales, "float32")]
    want = QuantizedWeight(format, values, scales, points).dequantize()
    np.testing.assert_array_equal(unpack_weight(kind, *arrays, shape), want)


def test_a_wide_scale_is_rounded():
    """To 19 bits beside INT4's zero point, and not at all of FP8."""
    scales = np.random.default_rng(3).uniform(0.5, 2, (64, 1)).astype(np.float32)
    codes = np.full((64, 128), 9, np.uint8)
    found = unpack_weight("int4", *ops.pack_weight("int4", codes, scales, None, (1, 128)), codes.shape)
    assert (np.abs(found / scales - 1) <= 2.0**-19).all()
    ones = np.ones((64, 128), ml_dtypes.float8_e4m3fn)
    found = unpack_weight("fp8", *ops.pack_weight("fp8", ones, scales, None, (1, 128)), ones.shape)
    assert (found == scales).all()


@pytest.mark.parametrize(
    ("kind", "shape", "columns", "message"),
    [
        ("int8", (64, 128), 128, "a weight is of int8: the kernels take int4 and fp8"),
        (
            "int4",
            (64, 136),
            136,
            "its outputs must be a multiple of 8 and its inputs one of 16",
        ),
        ("int4", (64, 256), 16, "has a scale for 16 inputs: it must be for 32, 64, 128, a multiple of 128 or all"),
        ("fp8", (64, 256), 64, "has a scale for 64 inputs: it must be for 128, a multiple of 128 or all"),
    ],
)
def test_a_weight_that_no_kernel_takes(kind, shape, columns, message):
    with pytest.raises(OpError, match=re.escape(message)):
        ops.PackedShape.of(kind, shape, columns)
