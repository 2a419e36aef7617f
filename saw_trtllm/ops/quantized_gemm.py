"""Linear layers with weights of 4 and 8 bits on the GPU, checked, and what the kernels want of such weights."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from saw_trtllm.errors import OpError
from saw_trtllm.ops.arrays import ACTIVATION_DTYPES, DeviceArray, common_device, kernels, raise_for, stream_handle

#: Rows of a weight that lie together.
ROWS = 64
#: Inputs that have a scale in common, where groups are no smaller; and groups that are.
CHUNK = 128
GROUPS = (32, 64, CHUNK)
#: Bits of a scale that hold INT4's zero point.
_ZERO_BITS = 5


@dataclass(frozen=True)
class PackedShape:
    """Shapes of a packed weight's two arrays: all that is known of it without its numbers.

    Attributes
    ----------
    kind : str
        ``int4`` or ``fp8``.
    out_features, in_features : int
    group : int
        Inputs that share a scale: 32, 64 or 128; larger groups have theirs several times.
    """

    kind: str
    out_features: int
    in_features: int
    group: int

    @classmethod
    def of(cls, kind: str, shape: tuple[int, ...], columns: int) -> PackedShape:
        """That of a weight ``[out, in]`` whose scales hold for so many columns.

        Raises
        ------
        OpError
            If no kernel takes it.
        """
        out, inputs = shape
        if kind not in ("int4", "fp8"):
            raise OpError(f"a weight is of {kind}: the kernels take int4 and fp8")
        if out % 8 or inputs % 16:
            raise OpError(
                f"a quantized weight has the shape {list(shape)}: its outputs must be a multiple of 8 and its inputs "
                "one of 16"
            )
        group = CHUNK if columns >= inputs or columns % CHUNK == 0 else columns
        if group not in GROUPS or (kind == "fp8" and group != CHUNK):
            sizes = "128" if kind == "fp8" else "32, 64, 128"
            raise OpError(
                f"a weight of {kind} has a scale for {columns} inputs: it must be for {sizes}, a multiple of 128 or all"
            )
        return cls(kind, out, inputs, group)

    @property
    def values(self) -> tuple[int, ...]:
        """Of the int32 array of values."""
        blocks, chunks = self._blocks
        return blocks, chunks, 4, 2 if self.kind == "int4" else 4, 32, 4

    @property
    def scales(self) -> tuple[int, ...]:
        """Of the float32 array of scales."""
        return *self._blocks, CHUNK // self.group, ROWS

    @property
    def _blocks(self) -> tuple[int, int]:
        return -(-self.out_features // ROWS), -(-self.in_features // CHUNK)


def pack_weight(
    kind: str, values: np.ndarray, scales: np.ndarray, zeros: np.ndarray | None, block: tuple[int, int]
) -> tuple[np.ndarray, np.ndarray]:
    """A quantized weight ``(values - zeros) · scales`` as the kernels take it.

    The layout is that of plugins/include/saw/quantized_gemm/weights.cuh. An INT4 scale keeps 18 bits after the first,
    more than float16 and bfloat16 have; the last five are its zero point.

    Parameters
    ----------
    kind : str
        ``int4`` or ``fp8``.
    values : numpy.ndarray
        ``[out, in]``: uint8 below 16, or float8_e4m3fn.
    scales : numpy.ndarray
        ``[ceil(out / block[0]), ceil(in / block[1])]`` of any float.
    zeros : numpy.ndarray or None
        uint8 of the same shape, up to 16; of fp8 always None, of int4 that is 8.
    block : tuple of int
        Rows and columns that share a scale.

    Returns
    -------
    values : numpy.ndarray
        int32 of :attr:`PackedShape.values`.
    scales : numpy.ndarray
        float32 of :attr:`PackedShape.scales`.

    Raises
    ------
    OpError
        If no kernel takes it.
    """
    packed = PackedShape.of(kind, values.shape, block[1])
    words = _spread(np.asarray(scales, np.float32), packed, block).view(np.uint32)
    if kind == "fp8":
        return _pack_fp8(values, packed), words.view(np.float32)
    points = np.full(scales.shape, 8, np.uint32) if zeros is None else zeros.astype(np.uint32)
    # Rounded to what is left, so that a float32 scale has half the error.
    words = (words + (1 << (_ZERO_BITS - 1)) & ~np.uint32((1 << _ZERO_BITS) - 1)) | _spread(points, packed, block)
    return _pack_int4(values, packed), words.view(np.float32)


def _pack_int4(values: np.ndarray, packed: PackedShape) -> np.ndarray:
    blocks, chunks, *_ = packed.values
    # Rows are block, warp, h (+ 8), g; columns chunk, half, step, pair (+ 8), t, i.
    x = _filled(values, packed).reshape(blocks, 4, 2, 8, chunks, 2, 4, 2, 4, 2)
    x = x[..., 0, :, :] | x[..., 1, :, :] << 4  # a byte has both pairs
    return (
        np.ascontiguousarray(x.transpose(0, 4, 1, 5, 3, 7, 6, 8, 2)).reshape(-1).view(np.int32).reshape(packed.values)
    )


def _pack_fp8(values: np.ndarray, packed: PackedShape) -> np.ndarray:
    blocks, chunks, *_ = packed.values
    # Rows as above; columns chunk, quarter, step, pair (+ 8), t, both i.
    x = _filled(values.view(np.uint8), packed).view("<u2").reshape(blocks, 4, 2, 8, chunks, 4, 2, 2, 4)
    return (
        np.ascontiguousarray(x.transpose(0, 4, 1, 5, 3, 8, 6, 7, 2)).reshape(-1).view(np.int32).reshape(packed.values)
    )


def _filled(x: np.ndarray, packed: PackedShape) -> np.ndarray:
    """With zeros, up to whole blocks and chunks."""
    blocks, chunks, *_ = packed.values
    rows, columns = x.shape
    return np.pad(x, ((0, blocks * ROWS - rows), (0, chunks * CHUNK - columns)))


def _spread(x: np.ndarray, packed: PackedShape, block: tuple[int, int]) -> np.ndarray:
    """What each block has, for each row and group, where the kernels look for it."""
    rows, columns = block
    blocks, chunks, groups, _ = packed.scales
    count = -(-packed.in_features // packed.group)
    x = np.repeat(x, rows, axis=0)[: packed.out_features] if rows > 1 else x
    x = np.repeat(x, -(-min(columns, packed.in_features) // packed.group), axis=1)[:, :count]
    x = np.pad(x, ((0, blocks * ROWS - packed.out_features), (0, chunks * groups - count)))
    # Rows are block, warp, h (+ 8), g.
    x = x.reshape(blocks, 4, 2, 8, chunks, groups).transpose(0, 4, 5, 1, 3, 2)
    return np.ascontiguousarray(x).reshape(packed.scales)


def quantized_gemm(x: Any, values: Any, scales: Any, *, packed: PackedShape, y: Any, stream: Any = None) -> None:
    """``y = x · weightᵀ`` of a packed weight, for few rows: each 64 read the weight again.

    The weight must not be written by the kernel that is before this one on the stream: on Hopper it is read before
    that has ended.

    Parameters
    ----------
    x : array
        float16 or bfloat16 ``[num_rows, in_features]``.
    values, scales : array
        Of :func:`pack_weight`.
    packed : PackedShape
    y : array
        As x, ``[num_rows, out_features]``, written.
    stream : int or stream object, optional
        Default: the legacy default stream.

    Raises
    ------
    OpError
        If an argument does not fit; nothing is launched.
    KernelError
        If the GPU rejects the launch.
    """
    rows = DeviceArray.of("x", x).check(ACTIVATION_DTYPES, ["num_rows", packed.in_features])
    out = DeviceArray.of("y", y).check(rows.dtype, [rows.shape[0], packed.out_features])
    weight, arrays = _weight(values, scales, packed)
    device = common_device([rows, out, *arrays])
    module, handle = kernels(), stream_handle(stream)
    code = module.quantized_gemm(
        x=rows.address,
        y=out.address,
        num_rows=rows.shape[0],
        dtype=getattr(module.DType, rows.dtype),
        device=device,
        stream=handle,
        **weight,
    )
    raise_for(code, "quantized_gemm", f"{rows.shape[0]} rows {rows.dtype} and {packed}")


def dequantize(
    values: Any, scales: Any, *, packed: PackedShape, y: Any, first_row: int = 0, stream: Any = None
) -> None:
    """Rows of a packed weight in 16 bits, each number rounded once.

    Parameters
    ----------
    values, scales : array
        Of :func:`pack_weight`.
    packed : PackedShape
    y : array
        float16 or bfloat16 ``[num_rows, in_features]``, written.
    first_row : int
        Of the weight; a multiple of 64.
    stream : int or stream object, optional
        Default: the legacy default stream.

    Raises
    ------
    OpError
        If an argument does not fit; nothing is launched.
    KernelError
        If the GPU rejects the launch.
    """
    out = DeviceArray.of("y", y).check(ACTIVATION_DTYPES, ["num_rows", packed.in_features])
    _check_rows(first_row, out.shape[0], packed)
    weight, arrays = _weight(values, scales, packed)
    device = common_device([out, *arrays])
    module, handle = kernels(), stream_handle(stream)
    code = module.dequantize(
        y=out.address,
        first_row=first_row,
        num_rows=out.shape[0],
        dtype=getattr(module.DType, out.dtype),
        device=device,
        stream=handle,
        **weight,
    )
    raise_for(code, "dequantize", f"{out.shape[0]} rows {out.dtype} of {packed}")


def quantize_rows(x: Any, *, values: Any, scales: Any, stream: Any = None) -> None:
    """Rows of activations as e4m3 numbers times a scale for each row: the largest's 448th.

    Parameters
    ----------
    x : array
        float16 or bfloat16 ``[num_rows, width]``; ``width`` is a multiple of 16.
    values : array
        uint8 ``[num_rows, width]``, written: the numbers' bytes.
    scales : array
        float32 ``[num_rows]``, written; 1 for a row of zeros.
    stream : int or stream object, optional
        Default: the legacy default stream.

    Raises
    ------
    OpError
        If an argument does not fit; nothing is launched.
    KernelError
        If the GPU rejects the launch.
    """
    rows = DeviceArray.of("x", x).check(ACTIVATION_DTYPES, ["num_rows", "width"])
    if rows.shape[1] % 16:
        raise OpError(f"x has rows of {rows.shape[1]} numbers: they must be a multiple of 16")
    out = DeviceArray.of("values", values).check("uint8", rows.shape)
    factors = DeviceArray.of("scales", scales).check("float32", rows.shape[:1])
    device = common_device([rows, out, factors])
    module, handle = kernels(), stream_handle(stream)
    code = module.quantize_rows(
        x=rows.address,
        num_rows=rows.shape[0],
        width=rows.shape[1],
        dtype=getattr(module.DType, rows.dtype),
        values=out.address,
        scales=factors.address,
        device=device,
        stream=handle,
    )
    raise_for(code, "quantize_rows", f"{rows.shape[0]} rows {rows.dtype} of {rows.shape[1]}")


def unpack_rows(
    values: Any,
    scales: Any,
    *,
    packed: PackedShape,
    row_values: Any,
    row_scales: Any,
    first_row: int = 0,
    stream: Any = None,
) -> None:
    """Rows of a packed weight in FP8 with one scale for each, as they were before they were packed.

    Parameters
    ----------
    values, scales : array
        Of :func:`pack_weight`.
    packed : PackedShape
    row_values : array
        uint8 ``[num_rows, in_features]``, written: the numbers' bytes.
    row_scales : array
        float32 ``[num_rows]``, written.
    first_row : int
        Of the weight; a multiple of 64.
    stream : int or stream object, optional
        Default: the legacy default stream.

    Raises
    ------
    OpError
        If an argument does not fit; nothing is launched.
    KernelError
        If the GPU rejects the launch.
    """
    if packed.kind != "fp8":
        raise OpError(f"a weight is of {packed.kind}: rows of 8 bits are unpacked of fp8")
    out = DeviceArray.of("row_values", row_values).check("uint8", ["num_rows", packed.in_features])
    factors = DeviceArray.of("row_scales", row_scales).check("float32", out.shape[:1])
    _check_rows(first_row, out.shape[0], packed)
    weight, arrays = _weight(values, scales, packed)
    device = common_device([out, factors, *arrays])
    code = kernels().unpack_rows(
        first_row=first_row,
        num_rows=out.shape[0],
        row_values=out.address,
        row_scales=factors.address,
        device=device,
        stream=stream_handle(stream),
        **weight,
    )
    raise_for(code, "unpack_rows", f"{out.shape[0]} rows of {packed}")


def _check_rows(first_row: int, num_rows: int, packed: PackedShape) -> None:
    if first_row % ROWS or not 0 <= first_row <= packed.out_features - num_rows:
        raise OpError(
            f"first_row is {first_row}: it must be a multiple of {ROWS}, and {num_rows} rows from there among the "
            f"{packed.out_features} of the weight"
        )


def _weight(values: Any, scales: Any, packed: PackedShape) -> tuple[dict[str, Any], list[DeviceArray]]:
    """The arguments that say where a weight lies, and its arrays."""
    arrays = [
        DeviceArray.of("values", values).check("int32", packed.values),
        DeviceArray.of("scales", scales).check("float32", packed.scales),
    ]
    weight = {
        "values": arrays[0].address,
        "scales": arrays[1].address,
        "type": getattr(kernels().WeightType, packed.kind),
        "in_features": packed.in_features,
        "out_features": packed.out_features,
        "group": packed.group,
    }
    return weight, arrays
