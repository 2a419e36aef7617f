"""Weights of linear layers in 4 or 8 bits: one form for all dialects of checkpoints, and what it means.

A block of a weight shares a scale: ``W = (values - zeros) · scales``, times a factor on each input where there is one.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Literal, NamedTuple, Union

import ml_dtypes
import numpy as np
from pydantic import BaseModel, ConfigDict

from saw_trtllm.model.config import DTypeName

Kind = Literal["int4", "int8", "fp8"]
#: How a W8A8 layer's input is quantized: by a stored scale, by one for each token, or for a token's 128 channels.
Activation = Literal["tensor", "token", "block"]

#: What a linear layer multiplies by.
Weight = Union[np.ndarray, "QuantizedWeight"]

_E4M3 = np.dtype(ml_dtypes.float8_e4m3fn)
_E4M3_MAX = float(ml_dtypes.finfo(_E4M3).max)
_BITS = {"int4": 4, "int8": 8, "fp8": 8}


class TensorSpec(NamedTuple):
    """Shape of a stored tensor, and NumPy's name of its dtype."""

    shape: tuple[int, ...]
    dtype: str

    @property
    def numpy_dtype(self) -> np.dtype:
        """The dtype itself."""
        return _dtype(self.dtype)

    @property
    def nbytes(self) -> int:
        """Its bytes."""
        return math.prod(self.shape) * self.numpy_dtype.itemsize


class WeightFormat(BaseModel):
    """How the weight ``[out, in]`` of a linear layer is quantized: all that is known without its numbers.

    Attributes
    ----------
    kind : str
        Integers without sign, or float8 e4m3.
    block : tuple of int
        Rows and columns that share a scale: (1, 128) are groups of 128, (1, in) is a scale for each output channel,
        (128, 128) are the blocks of block FP8. The last block of either axis may be smaller.
    zeros : bool
        Whether each block has a zero point of its own; otherwise integers have the middle of their range, 8 or 128.
    act_order : bool
        Whether columns belong to groups in an order of their own.
    pre_scale : bool
        Whether the layer's input is multiplied by a factor for each channel (AWQ's smoothing, where no norm took it).
    activation : str or None
        How the layer's input is quantized; None leaves it in 16 bits.
    scale_dtype : str
        Of the scales.
    """

    model_config = ConfigDict(frozen=True)

    kind: Kind
    block: tuple[int, int]
    zeros: bool = False
    act_order: bool = False
    pre_scale: bool = False
    activation: Activation | None = None
    scale_dtype: DTypeName = "float32"

    @property
    def bits(self) -> int:
        """Of a value."""
        return _BITS[self.kind]

    @property
    def zero(self) -> int:
        """The integer that means 0 where blocks have no zero points."""
        return 0 if self.kind == "fp8" else 1 << (self.bits - 1)

    @property
    def writable(self) -> bool:
        """Whether :func:`quantize` rounds to it."""
        return self.block[0] == 1 and not (self.act_order or self.pre_scale or self.activation == "tensor")

    def grid(self, shape: tuple[int, ...]) -> tuple[int, int]:
        """Blocks along each axis of a weight."""
        (out, inputs), (rows, columns) = shape, self.block
        return -(-out // rows), -(-inputs // columns)

    def tensors(self, name: str, shape: tuple[int, ...]) -> dict[str, TensorSpec]:
        """The tensors that an engine has of the weight ``name``: its values first, int4 as two of a row in a byte."""
        out, inputs = shape
        found = {"": TensorSpec((out, -(-inputs * self.bits // 8)), "uint8")}
        found[".scales"] = TensorSpec(self.grid(shape), self.scale_dtype)
        if self.zeros:
            found[".zeros"] = TensorSpec(self.grid(shape), "uint8")
        if self.act_order:
            found[".group_index"] = TensorSpec((inputs,), "int32")
        if self.pre_scale:
            found[".pre_scale"] = TensorSpec((inputs,), "float32")
        if self.activation == "tensor":
            found[".input_scale"] = TensorSpec((1,), "float32")
        return {name + suffix: spec for suffix, spec in found.items()}

    def nbytes(self, shape: tuple[int, ...]) -> int:
        """Bytes of :meth:`tensors`."""
        return sum(spec.nbytes for spec in self.tensors("", shape).values())

    def describe(self, shape: tuple[int, ...]) -> str:
        """Its words for a table, of a weight of a shape: INT4 in groups of 128, FP8 by output channel."""
        rows, columns = self.block
        if rows > 1:
            return f"{self.kind.upper()} in blocks of {rows} x {columns}"
        return self.kind.upper() + (f" in groups of {columns}" if columns < shape[1] else " by output channel")


@dataclass(frozen=True, eq=False)
class QuantizedWeight:
    """A quantized weight.

    Attributes
    ----------
    format : WeightFormat
    values : numpy.ndarray
        ``[out, in]``: uint8, one integer each, or float8_e4m3fn.
    scales : numpy.ndarray
        ``format.grid``, in ``format.scale_dtype``.
    zeros : numpy.ndarray or None
        uint8 ``format.grid``, exact.
    group_index : numpy.ndarray or None
        int32 ``[in]``: the group of each column.
    pre_scale : numpy.ndarray or None
        fp32 ``[in]``.
    input_scale : numpy.ndarray or None
        fp32 ``[1]``: what a value of the quantized input stands for.
    """

    format: WeightFormat
    values: np.ndarray
    scales: np.ndarray
    zeros: np.ndarray | None = None
    group_index: np.ndarray | None = None
    pre_scale: np.ndarray | None = None
    input_scale: np.ndarray | None = None

    @property
    def shape(self) -> tuple[int, ...]:
        """Of the weight, ``[out, in]``."""
        return self.values.shape

    def dequantize(self) -> np.ndarray:
        """The weight in fp32: each factor exact, each product rounded once."""
        weight = self.values.astype(np.float32)
        if self.format.kind != "fp8":
            weight -= self.format.zero if self.zeros is None else self._spread(self.zeros)
        weight *= self._spread(self.scales)
        if self.pre_scale is not None:
            weight *= self.pre_scale
        return weight

    def by_row(self) -> QuantizedWeight:
        """The same weight with a scale, and a zero point, for each row of a block."""
        rows, columns = self.format.block
        if rows == 1:
            return self

        def each(x: np.ndarray | None) -> np.ndarray | None:
            return None if x is None else np.repeat(x, rows, axis=0)[: len(self.values)]

        scales = np.repeat(self.scales, rows, axis=0)[: len(self.values)]
        by_row = self.format.model_copy(update={"block": (1, columns)})
        return replace(self, format=by_row, scales=scales, zeros=each(self.zeros))

    def arrays(self, name: str) -> dict[str, np.ndarray]:
        """What an engine has of it, as :meth:`WeightFormat.tensors` names it."""
        values = np.ascontiguousarray(self.values).view(np.uint8)
        found: dict[str, np.ndarray | None] = {"": pack_nibbles(values) if self.format.kind == "int4" else values}
        found |= {".scales": self.scales, ".zeros": self.zeros, ".group_index": self.group_index}
        found |= {".pre_scale": self.pre_scale, ".input_scale": self.input_scale}
        return {name + suffix: np.ascontiguousarray(x) for suffix, x in found.items() if x is not None}

    @classmethod
    def of_arrays(
        cls, format: WeightFormat, name: str, shape: tuple[int, ...], arrays: Mapping[str, np.ndarray]
    ) -> QuantizedWeight:
        """The inverse of :meth:`arrays`; raises ValueError if a tensor has another shape than ``format`` gives it."""
        for tensor, spec in format.tensors(name, shape).items():
            if arrays[tensor].shape != spec.shape:
                raise ValueError(f"{tensor} has the shape {list(arrays[tensor].shape)} where {list(spec.shape)} is due")
        values = arrays[name]
        values = unpack_nibbles(values, shape[1]) if format.kind == "int4" else values
        rest = (arrays.get(f"{name}.{field}") for field in ("zeros", "group_index", "pre_scale", "input_scale"))
        return cls(format, values.view(_E4M3) if format.kind == "fp8" else values, arrays[name + ".scales"], *rest)

    def _spread(self, x: np.ndarray) -> np.ndarray:
        """fp32: what each block has, for all of its numbers or broadcast to them."""
        (rows, columns), (out, inputs) = self.format.block, self.values.shape
        x = x.astype(np.float32)
        if self.group_index is not None:
            return x[:, self.group_index]
        x = x if x.shape[1] == 1 else np.repeat(x, columns, axis=1)[:, :inputs]
        return x if rows == 1 else np.repeat(x, rows, axis=0)[:out]


def fused_format(formats: Sequence[WeightFormat], shapes: Sequence[tuple[int, ...]]) -> WeightFormat | None:
    """The format of weights one above the other, or None where they do not fit each other."""
    first = formats[0]
    if any(f.model_copy(update={"scale_dtype": first.scale_dtype}) != first for f in formats):
        return None
    if any(shape[0] % first.block[0] for shape in shapes[:-1]):
        first = first.model_copy(update={"block": (1, first.block[1])})
    dtype = first.scale_dtype if len({f.scale_dtype for f in formats}) == 1 else "float32"
    return first.model_copy(update={"scale_dtype": dtype})


def fuse(parts: Sequence[QuantizedWeight], format: WeightFormat) -> QuantizedWeight:
    """Weights one above the other, each with its own scales; of stored scales of their one input the largest.

    Raises
    ------
    ValueError
        If the parts want different inputs: another order of columns, or other factors.
    """
    if len(parts) == 1:
        return parts[0]
    for field in ("group_index", "pre_scale"):
        found = [getattr(part, field) for part in parts]
        if found[0] is not None and not all(np.array_equal(found[0], x) for x in found):
            raise ValueError(field)
    parts = [part.by_row() if format.block[0] == 1 else part for part in parts]
    zeros = [part.zeros for part in parts if part.zeros is not None]
    inputs = [part.input_scale for part in parts if part.input_scale is not None]
    scales = [part.scales.astype(_dtype(format.scale_dtype)) for part in parts]
    return replace(
        parts[0],
        format=format,
        values=np.concatenate([part.values for part in parts]),
        scales=np.concatenate(scales),
        zeros=np.concatenate(zeros) if zeros else None,
        input_scale=np.max(inputs, axis=0) if inputs else None,
    )


def quantize(weight: np.ndarray, format: WeightFormat) -> QuantizedWeight:
    """Round a weight ``[out, in]`` to the nearest values: FP8 by its largest number, integers between two.

    Raises
    ------
    ValueError
        If ``format`` is not :attr:`WeightFormat.writable`.
    """
    if not format.writable:
        raise ValueError(f"weights are not rounded to {format}")
    columns, (out, inputs) = format.block[1], weight.shape
    lacking = -inputs % columns
    groups = np.pad(weight.astype(np.float32), ((0, 0), (0, lacking)), mode="edge").reshape(out, -1, columns)
    dtype = _dtype(format.scale_dtype)
    tiny = np.float32(ml_dtypes.finfo(dtype).tiny)
    if format.kind == "fp8":
        scales = np.maximum(np.abs(groups).max(-1) / _E4M3_MAX, tiny).astype(dtype)
        scaled = groups / scales.astype(np.float32)[..., None]
        values, zeros = scaled.clip(-_E4M3_MAX, _E4M3_MAX).astype(_E4M3), None
    else:
        top = (1 << format.bits) - 1
        low, high = np.minimum(groups.min(-1), 0), np.maximum(groups.max(-1), 0)
        if not format.zeros:
            high = np.maximum(-low, high)
            low = -high
        scales = np.maximum((high - low) / top, tiny).astype(dtype)
        wide = scales.astype(np.float32)
        points = np.rint(-low / wide).clip(0, top) if format.zeros else np.full_like(wide, format.zero)
        values = np.rint(groups / wide[..., None] + points[..., None]).clip(0, top).astype(np.uint8)
        zeros = points.astype(np.uint8) if format.zeros else None
    return QuantizedWeight(format, values.reshape(out, -1)[:, :inputs], scales, zeros)


def pack_nibbles(values: np.ndarray) -> np.ndarray:
    """uint8 ``[n, m]`` below 16 to ``[n, ceil(m / 2)]``: the first of two in the low half of a byte."""
    low, high = values[:, ::2], values[:, 1::2]
    packed = low.copy()
    packed[:, : high.shape[1]] |= high << 4
    return packed


def unpack_nibbles(packed: np.ndarray, columns: int) -> np.ndarray:
    """The inverse of :func:`pack_nibbles`."""
    return np.stack([packed & 15, packed >> 4], axis=-1).reshape(len(packed), -1)[:, :columns]


def _dtype(name: str) -> np.dtype:
    return np.dtype(getattr(ml_dtypes, name, name))
