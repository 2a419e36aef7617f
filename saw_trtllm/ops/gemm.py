"""Linear layers with 16-bit weights for few rows on the GPU, checked."""

from __future__ import annotations

from typing import Any

from saw_trtllm.errors import OpError
from saw_trtllm.ops.arrays import (
    ACTIVATION_DTYPES,
    DeviceArray,
    address,
    common_device,
    kernels,
    raise_for,
    stream_handle,
)

#: Rows that the kernels take: from here on cuBLAS is as fast.
MAX_ROWS = 16


def gemm(x: Any, weight: Any, *, y: Any, gate: Any = None, stream: Any = None) -> None:
    """``y = x · weightᵀ``, or with a gate ``silu(x · weightᵀ) · (x · gateᵀ)``; on Hopper alone.

    Sums are in float32 and rounded once, with a gate once more, as by :func:`silu_mul`. The weights must not be
    written by the kernel that is before this one on the stream: they are read before that has ended.

    Parameters
    ----------
    x : array
        float16 or bfloat16 ``[num_rows, in_features]``: at most 16 rows, in_features a multiple of 8.
    weight : array
        As x, ``[out_features, in_features]``; out_features is a multiple of 4.
    y : array
        As x or, without a gate, float32: ``[num_rows, out_features]``, written.
    gate : array, optional
        As weight.
    stream : int or stream object, optional
        Default: the legacy default stream.

    Raises
    ------
    OpError
        If an argument does not fit; nothing is launched.
    KernelError
        If the GPU rejects the launch.
    """
    rows = DeviceArray.of("x", x).check(ACTIVATION_DTYPES, ["num_rows", "in_features"])
    count, inputs = rows.shape
    first = DeviceArray.of("weight", weight).check(rows.dtype, ["out_features", inputs])
    other = None if gate is None else DeviceArray.of("gate", gate).check(rows.dtype, first.shape)
    outputs = first.shape[0]
    dtypes = (rows.dtype, "float32") if other is None else (rows.dtype,)
    out = DeviceArray.of("y", y).check(dtypes, [count, outputs])
    if count > MAX_ROWS or inputs % 8 or outputs % 4:
        raise OpError(
            f"x has shape {list(rows.shape)} and weight {list(first.shape)}: at most {MAX_ROWS} rows, a multiple of 8 "
            "inputs and a multiple of 4 outputs are taken"
        )
    device = common_device([rows, first, out, other])
    module, handle = kernels(), stream_handle(stream)
    code = module.gemm(
        x=rows.address,
        weight=first.address,
        gate=address(other),
        y=out.address,
        num_rows=count,
        in_features=inputs,
        out_features=outputs,
        dtype=getattr(module.DType, rows.dtype),
        wide=out.dtype == "float32",
        device=device,
        stream=handle,
    )
    raise_for(code, "gemm", f"{count} rows {rows.dtype} and a weight of {list(first.shape)}")
