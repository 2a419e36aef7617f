"""Rows of an embedding on the GPU, checked."""

from __future__ import annotations

from typing import Any

from saw_trtllm.ops.arrays import ACTIVATION_DTYPES, DeviceArray, common_device, kernels, raise_for, stream_handle


def lookup(table: Any, rows: Any, *, out: Any, stream: Any = None) -> None:
    """``out[i] = table[rows[i]]``, or zeros where the table has no such row.

    Parameters
    ----------
    table : array
        float16 or bfloat16 ``[num_rows, width]``.
    rows : array
        int32 ``[num_tokens]``.
    out : array
        ``[num_tokens, width]`` of table's dtype, written.
    stream : int or stream object, optional
        Default: the legacy default stream.

    Raises
    ------
    OpError
        If an argument does not fit; nothing is launched.
    KernelError
        If the GPU rejects the launch.
    """
    source = DeviceArray.of("table", table).check(ACTIVATION_DTYPES, ["num_rows", "width"])
    num_rows, width = source.shape
    which = DeviceArray.of("rows", rows).check("int32", ["num_tokens"], 4)
    (num_tokens,) = which.shape
    target = DeviceArray.of("out", out).check(source.dtype, [num_tokens, width])
    device = common_device([source, which, target])
    module, handle = kernels(), stream_handle(stream)
    code = module.lookup(
        table=source.address,
        rows=which.address,
        out=target.address,
        num_tokens=num_tokens,
        num_rows=num_rows,
        width=width,
        device=device,
        stream=handle,
    )
    raise_for(code, "lookup", f"{num_tokens} of {num_rows} rows of {width} {source.dtype}")
