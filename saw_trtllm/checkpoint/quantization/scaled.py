"""FP8 weights and their scales, which several dialects store alike under names of their own."""

from __future__ import annotations

import numpy as np

from saw_trtllm.checkpoint.quantization.dialect import FLOATS, Linear, StoredWeight
from saw_trtllm.checkpoint.reader import StoredTensor
from saw_trtllm.model.quantization import Activation, QuantizedWeight, WeightFormat


def stored_fp8(
    linear: Linear,
    scale: str,
    block: tuple[int, int] | None,
    activation: Activation | None,
    input_scale: str | None = None,
) -> StoredWeight:
    """A weight in e4m3, ``[out, in]``.

    Parameters
    ----------
    linear : Linear
    scale : str
        Name of its scales: one, one for each output channel, or one for each block.
    block : tuple of int or None
        Rows and columns of blocks.
    activation : str or None
        How the layer's input is quantized.
    input_scale : str, optional
        Name of the stored scale of its input.
    """
    out, inputs = linear.shape
    values = linear.take("weight", ("F8_E4M3",), linear.shape)
    if block is None:
        kind = WeightFormat(kind="fp8", block=(1, inputs), activation=activation)
        scales = linear.take(scale, FLOATS, (out, 1), (out,), (1,), (), (1, 1))
    else:
        kind = WeightFormat(kind="fp8", block=block, activation=activation)
        rows, columns = kind.grid(linear.shape)
        scales = linear.take(scale, FLOATS, (rows, columns), (rows, 1, columns, 1))
    kind = kind.model_copy(update={"scale_dtype": scales.dtype})
    static = None if input_scale is None else linear.take(input_scale, FLOATS, (1,), ())
    tensors: list[StoredTensor] = [values, scales] + ([] if static is None else [static])

    def unpack() -> QuantizedWeight:
        grid = scales.load().reshape(kind.grid(linear.shape) if block else (-1, 1))
        grid = grid if block else np.broadcast_to(grid, (out, 1))
        stored = None if static is None else static.load().astype(np.float32).reshape(1)
        return QuantizedWeight(kind, values.load(), np.ascontiguousarray(grid), input_scale=stored)

    return StoredWeight(linear.name, linear.shape, kind, tuple(tensors), unpack)
