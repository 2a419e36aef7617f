"""The gate of an MLP on the GPU, checked."""

from __future__ import annotations

from math import prod
from typing import Any

from saw_trtllm.ops.arrays import ACTIVATION_DTYPES, DeviceArray, common_device, kernels, raise_for, stream_handle


def silu_mul(a: Any, b: Any, *, y: Any, stream: Any = None) -> None:
    """``y = a · sigmoid(a) · b``, in fp32 and rounded once.

    Parameters
    ----------
    a, b : array
        float16 or bfloat16 ``[num_rows, width]``.
    y : array
        As a, written.
    stream : int or stream object, optional
        Default: the legacy default stream.

    Raises
    ------
    OpError
        If an argument does not fit; nothing is launched.
    KernelError
        If the GPU rejects the launch.
    """
    gate = DeviceArray.of("a", a).check(ACTIVATION_DTYPES, ["num_rows", "width"])
    other, out = (DeviceArray.of(name, x).check(gate.dtype, gate.shape) for name, x in (("b", b), ("y", y)))
    device = common_device([gate, other, out])
    module, handle = kernels(), stream_handle(stream)
    code = module.silu_mul(
        a=gate.address,
        b=other.address,
        y=out.address,
        count=prod(gate.shape),
        dtype=getattr(module.DType, gate.dtype),
        device=device,
        stream=handle,
    )
    raise_for(code, "silu_mul", f"{list(gate.shape)} {gate.dtype}")
