"""RMSNorm on the GPU, checked."""

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


def rms_norm(
    x: Any,
    weight: Any,
    *,
    y: Any,
    epsilon: float,
    residual: Any = None,
    sum_out: Any = None,
    stream: Any = None,
) -> None:
    """``y = x / rms(x) · weight`` of each head of each row, in fp32 and rounded once.

    Heads from the first without a weight on stay as they are. With a residual the rows are ``x + residual``, rounded.

    Parameters
    ----------
    x : array
        float16 or bfloat16 ``[num_rows, num_heads, width]``; a row of one head is a token's activations.
    weight : array
        float32 ``[num_normed, width]``, num_normed from 1 to num_heads.
    y : array
        As x, written.
    epsilon : float
        Added to the mean square.
    residual, sum_out : array, optional
        As x, together: what is added to x, and the sum, written.
    stream : int or stream object, optional
        Default: the legacy default stream.

    Raises
    ------
    OpError
        If an argument does not fit; nothing is launched.
    KernelError
        If the GPU rejects the launch.
    """
    rows = DeviceArray.of("x", x).check(ACTIVATION_DTYPES, ["num_rows", "num_heads", "width"])
    num_rows, num_heads, width = rows.shape
    factors = DeviceArray.of("weight", weight).check("float32", ["num_normed", width])
    num_normed = factors.shape[0]
    if not 1 <= num_normed <= num_heads:
        raise OpError(f"weight has {num_normed} rows and x has {num_heads} heads: it must have 1 to {num_heads}")
    if (residual is None) != (sum_out is None):
        given, lacking = ("sum_out", "residual") if residual is None else ("residual", "sum_out")
        raise OpError(f"{given} is given and {lacking} is not: give both or neither")

    def like_x(name: str, array: Any) -> DeviceArray | None:
        return None if array is None else DeviceArray.of(name, array).check(rows.dtype, rows.shape)

    out, added, total = like_x("y", y), like_x("residual", residual), like_x("sum_out", sum_out)
    device = common_device([rows, factors, out, added, total])
    module, handle = kernels(), stream_handle(stream)
    code = module.rms_norm(
        x=rows.address,
        residual=address(added),
        weight=factors.address,
        y=address(out),
        sum=address(total),
        num_rows=num_rows,
        num_heads=num_heads,
        num_normed=num_normed,
        width=width,
        epsilon=epsilon,
        dtype=getattr(module.DType, rows.dtype),
        device=device,
        stream=handle,
    )
    raise_for(code, "rms_norm", f"{num_rows} rows of {num_heads} heads of {width} {rows.dtype}")
