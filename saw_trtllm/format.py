"""The KV-cache format ``saw_int4`` v1 and its siblings: what a row is, and how rows lie in the pool.

Per token and KV head, K and V each, one **row**::

    byte   0 .. head_dim/2 - 1     codes: byte b holds dim 2b in its low nibble and dim 2b+1 in its high one
    byte   head_dim/2 .. +1        scale, fp16
    byte   head_dim/2 + 2 .. +3    lo, fp16

K is stored after RoPE, V as projected, both times the block-diagonal Hadamard matrix B of order ``hadamard_order``.
With ``y`` such a rotated row and γ the writer's range factor::

    mid = (max y + min y) / 2      half = γ (max y - min y) / 2
    lo = fp16(mid - half)          scale = fp16(max(2 half, EPS) / 15)
    code = clamp(rint((y - lo) / scale), 0, 15)                  ŷ = code · scale + lo

``code`` comes from the *rounded* scale and lo; what fp16 cannot hold becomes its largest number. The codes keep the
order of the dims: a tensor-core fragment takes any order of the reduction index as long as both operands agree, so the
kernels permute Q in registers, not the cache.

A pool is ``uint8 [num_blocks, num_layers, 2 (K, V), num_kv_heads, tokens_per_block, row_bytes]``. Rows are whole, token
by token, so whole blocks and the first n rows of a block can be moved as bytes by code that knows nothing of them.

A writer may choose a row's ends instead, which a reader does not see either: of all pairs (a, b) of :data:`END_CUTS`, a
slower than b, the first with the least ``Σ (ŷ - y)²`` for ``lo = fp16(min y + a r)``, ``scale = fp16(max((1 - a - b) r,
EPS) / 15)`` and ``r = max y - min y``.

The format ``int4`` is the same without the rotation (order 1); ``fp16`` stores rows of the engine's dtype. In
``saw_k8v4`` K's rows hold 8-bit codes, 0 to 255 and a byte each, between ``min y`` and ``max y``, and scale and lo;
V's are ``saw_int4``'s. A layer of a block is then ``num_kv_heads · tokens_per_block`` rows of K, head by head, and as
many of V: ``uint8 [num_blocks, num_layers, num_kv_heads, tokens_per_block, pair_bytes]``, whose last three axes only
count its bytes.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

import numpy as np

from saw_trtllm.errors import ConfigError

FORMAT_VERSION = 1

KvName = Literal["fp16", "int4", "saw_int4", "saw_k8v4"]
KV_NAMES: tuple[str, ...] = get_args(KvName)
#: Caches whose rows are rotated, and may have a calibration's frames.
ROTATED = ("saw_int4", "saw_k8v4")
HEAD_DIMS = (64, 96, 128, 256)
MIN_HADAMARD_ORDER = 16
TOKENS_PER_BLOCK = (16, 32, 64, 128)

CODE_MAX = 15
#: Of a key's 8-bit row.
CODE_MAX_8 = 255
#: Smallest scale before it is rounded: that of a constant row is fp16's smallest number instead of 0.
MIN_SCALE = 2.0**-24
#: The range that it stands for in a 4-bit row.
EPS = CODE_MAX * MIN_SCALE
#: The writer's range factor by head_dim. A row's extremes are the rarer the longer it is. Of Gaussian rows these have a
#: mean square error within 1 % of the least, 4 to 13 % below min-max; on the example model the errors of keys, values
#: and scores agree, for every order and without rotation, so one factor serves
#: all (benchmarks/accuracy/range_factor.py).
RANGE_FACTORS = {64: 0.97, 96: 0.95, 128: 0.94, 256: 0.90}
#: Numbers in fp32 that a core's cache holds, beside what is computed of them.
_CACHED = 1 << 17
#: Shares of a row's range that a writer which chooses may cut off an end. Of Gaussian rows of 64 the nine pairs have a
#: mean square error 10 % below the range factor's; 25 pairs up to 0.08 12 %, the four of 0 and 0.04 8 %.
END_CUTS = (0.0, 0.03, 0.06)
#: Bytes of scale and lo after the codes.
ROW_TAIL_BYTES = 4

DTYPE_BYTES = {"float16": 2, "bfloat16": 2, "float32": 4}


@dataclass(frozen=True, init=False)
class KVFormat:
    """How an engine's KV cache is stored.

    Parameters
    ----------
    kv : {"fp16", "int4", "saw_int4", "saw_k8v4"}
        ``fp16`` stores rows of ``dtype``, the engine's own type, whatever its name.
    head_dim : int
        One of 64, 96, 128, 256.
    dtype : str
        The engine's dtype: the row type of ``fp16``.
    hadamard_order : int, optional
        Order h of the rotation's blocks: a power of two from 16 that divides ``head_dim``. Default for a rotated cache:
        the largest. 1, no rotation, for ``int4`` and ``fp16``.
    rotate_v : bool, optional
        Whether V is rotated too. Default: true for a rotated cache.
    range_factor : float, optional
        γ of the writer, in (0, 1]; 1 is the paper's min-max. A reader never sees it. Default for a 4-bit cache:
        :data:`RANGE_FACTORS`; it has no meaning for ``fp16``.

    Raises
    ------
    ConfigError
        If a value is outside of what the format allows.
    """

    kv: str
    head_dim: int
    dtype: str
    hadamard_order: int
    rotate_v: bool
    range_factor: float

    def __init__(
        self,
        kv: str,
        head_dim: int,
        dtype: str = "float16",
        hadamard_order: int | None = None,
        rotate_v: bool | None = None,
        range_factor: float | None = None,
    ) -> None:
        if kv not in KV_NAMES:
            raise ConfigError(f"kv {kv!r} is unknown: choose one of {', '.join(KV_NAMES)}")
        if dtype not in DTYPE_BYTES:
            raise ConfigError(f"dtype {dtype!r} is unknown: choose one of {', '.join(DTYPE_BYTES)}")
        if head_dim not in HEAD_DIMS:
            raise ConfigError(
                f"head_dim {head_dim} is not supported: this version's caches hold heads of "
                f"{', '.join(map(str, HEAD_DIMS))}"
            )
        if range_factor is None:
            range_factor = 1.0 if kv == "fp16" else RANGE_FACTORS[head_dim]
        if not 0.0 < range_factor <= 1.0:
            raise ConfigError(f"range_factor is {range_factor}: it must be above 0 and at most 1")
        if kv in ROTATED:
            order = default_hadamard_order(head_dim) if hadamard_order is None else hadamard_order
            if order < MIN_HADAMARD_ORDER or order & (order - 1) or head_dim % order:
                valid = ", ".join(map(str, hadamard_orders(head_dim)))
                raise ConfigError(f"hadamard_order {order} does not fit head_dim {head_dim}: choose one of {valid}")
        elif hadamard_order in (None, 1) and not rotate_v:
            order, rotate_v = 1, False
        else:
            raise ConfigError(
                f"kv {kv} has no rotation: hadamard_order and rotate_v belong to --kv saw_int4 and saw_k8v4"
            )
        values = (kv, head_dim, dtype, order, True if rotate_v is None else rotate_v, range_factor)
        for name, value in zip(self.__dataclass_fields__, values, strict=True):
            object.__setattr__(self, name, value)  # it is frozen

    @property
    def quantized(self) -> bool:
        """Whether rows are codes with a scale and a lo."""
        return self.kv != "fp16"

    @property
    def rotated(self) -> bool:
        """Whether rows are rotated before they are quantized, by a Hadamard matrix or by a frame."""
        return self.kv in ROTATED

    def with_8bit_keys(self) -> KVFormat:
        """The rotated cache with keys in 8 bits, as some layers of this one may have it."""
        return KVFormat("saw_k8v4", self.head_dim, self.dtype, self.hadamard_order, self.rotate_v, self.range_factor)

    @property
    def row_bytes(self) -> int:
        """Bytes of one row: one token, one KV head, V, and K too unless its codes have 8 bits."""
        if self.quantized:
            return self.head_dim // 2 + ROW_TAIL_BYTES
        return self.head_dim * DTYPE_BYTES[self.dtype]

    @property
    def k_row_bytes(self) -> int:
        """Bytes of a row of K."""
        return self.head_dim + ROW_TAIL_BYTES if self.kv == "saw_k8v4" else self.row_bytes

    @property
    def pair_bytes(self) -> int:
        """Bytes of both rows of a token and KV head."""
        return self.k_row_bytes + self.row_bytes

    def bytes_per_token(self, num_layers: int, num_kv_heads: int) -> int:
        """Bytes that one token takes in a pool of all layers."""
        return num_layers * num_kv_heads * self.pair_bytes

    def pool_shape(self, num_blocks: int, num_layers: int, num_kv_heads: int, tokens_per_block: int) -> tuple[int, ...]:
        """Shape of the ``uint8`` pool."""
        if self.k_row_bytes != self.row_bytes:
            return (num_blocks, num_layers, num_kv_heads, tokens_per_block, self.pair_bytes)
        return (num_blocks, num_layers, 2, num_kv_heads, tokens_per_block, self.row_bytes)


def hadamard_orders(head_dim: int) -> list[int]:
    """The orders that a head_dim allows, ascending: powers of two from 16 that divide it."""
    return [o for o in (16, 32, 64, 128, 256) if head_dim % o == 0]


def default_hadamard_order(head_dim: int) -> int:
    """The largest order: head_dim itself for 64, 128, 256; 32 for 96."""
    return hadamard_orders(head_dim)[-1]


def hadamard(order: int) -> np.ndarray:
    """Sylvester's Hadamard matrix over sqrt(order): symmetric and orthonormal.

    Parameters
    ----------
    order : int
        A power of two.

    Returns
    -------
    numpy.ndarray
        float32 ``[order, order]``.
    """
    index = np.arange(order)
    bits = index[:, None] & index[None, :]
    parity = np.zeros_like(bits)
    while bits.any():
        parity ^= bits & 1
        bits >>= 1
    return ((1 - 2 * parity) / np.sqrt(order)).astype(np.float32)


def rotate(x: np.ndarray, order: int, axis: int = -1) -> np.ndarray:
    """``x · B`` over an axis, B block-diagonal with Hadamard blocks of ``order``, in fp32.

    By butterflies, so that every machine, whatever its BLAS, gives the same bits.

    Parameters
    ----------
    x : numpy.ndarray
        The axis has a multiple of ``order`` elements.
    order : int
        Order of the blocks; 1 leaves x as it is.
    axis : int
        0, or the last.

    Returns
    -------
    numpy.ndarray
        float32, of x's shape.
    """
    x = np.asarray(x, dtype=np.float32)
    if order == 1:
        return x
    result = np.empty(x.shape, np.float32)
    # Columns whose transform stays in a core's cache; those of the last axis are turned to lie so.
    columns = _CACHED // order
    if axis == 0:
        blocks = list(zip(x.reshape(-1, order, x[0].size), result.reshape(-1, order, x[0].size), strict=True))
    else:
        blocks = [(x.reshape(-1, order).T, result.reshape(-1, order).T)]
    for source, target in blocks:
        for i in range(0, source.shape[1], columns):
            target[:, i : i + columns] = _transform(np.array(source[:, i : i + columns], order="C"))
    return result


def _transform(x: np.ndarray) -> np.ndarray:
    """Sylvester's matrix over sqrt(order) times ``x [order, n]``, in its place."""
    order, width = len(x), 1
    while width < order:
        pairs = x.reshape(order // (2 * width), 2, width, -1)
        upper, lower = pairs[:, 0], pairs[:, 1]
        difference = upper - lower
        upper += lower
        lower[...] = difference
        width *= 2
    x *= np.float32(order**-0.5)
    return x
