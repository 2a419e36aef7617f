"""What becomes of keys and values in a cache: the quantizers that an evaluation puts between writing and reading."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from typing import TYPE_CHECKING, Protocol

import torch

from saw_trtllm.backends.reference.int4 import TORCH_DTYPES, dequantize, quantize, quantize_8bit
from saw_trtllm.format import KVFormat, hadamard

if TYPE_CHECKING:
    from saw_trtllm.checkpoint.calibration import Calibration


class KVQuantizer(Protocol):
    """Keys and values as a reader of the cache sees them, in the basis that they were written in.

    Attributes
    ----------
    tokenwise : bool
        Whether a token's rows depend only on that token. Only then can pages be shared, and a decode append one.
    """

    tokenwise: bool

    def quantize(self, layer: int, k: torch.Tensor, v: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Write and read back all tokens of a sequence.

        Parameters
        ----------
        layer : int
        k : torch.Tensor
            fp32 ``[num_tokens, num_kv_heads, head_dim]``, after RoPE.
        v : torch.Tensor
            fp32, the same shape.

        Returns
        -------
        tuple of torch.Tensor
            fp32, the same shapes.
        """
        ...

    def first_exact(self, lengths: torch.Tensor) -> torch.Tensor | None:
        """First token that a query over ``lengths`` tokens (int64 ``[n]``) still sees unquantized; None for none."""
        ...

    def layer_bytes(self, layer: int, num_kv_heads: int, head_dim: int) -> float:
        """Bytes that a token takes in ``layer``, K and V together."""
        ...


class TokenwiseQuantizer:
    """Base of the quantizers that treat each token by itself."""

    tokenwise = True

    def first_exact(self, lengths: torch.Tensor) -> torch.Tensor | None:
        """None: the current token is read from the cache like all others."""
        return None


class Exact(TokenwiseQuantizer):
    """Rows of the model's dtype: the baseline that ``--kv fp16`` names.

    Parameters
    ----------
    dtype : str
        "float16", "bfloat16" or "float32".
    """

    def __init__(self, dtype: str) -> None:
        self.dtype = TORCH_DTYPES[dtype]

    def quantize(self, layer: int, k: torch.Tensor, v: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Round to the dtype."""
        return k.to(self.dtype).float(), v.to(self.dtype).float()

    def layer_bytes(self, layer: int, num_kv_heads: int, head_dim: int) -> float:
        """Both rows in the dtype."""
        return 2 * num_kv_heads * head_dim * self.dtype.itemsize


class QuantizedRows(TokenwiseQuantizer):
    """The rows of codes of :mod:`saw_trtllm.format`, with the levers that leave the exact model as it is.

    Parameters
    ----------
    k_format, v_format : KVFormat
        Of the keys' rows and of the values': they may differ in ``range_factor``.
    k_center : torch.Tensor, optional
        fp32 ``[num_layers, num_kv_heads, head_dim]``, subtracted from the keys after RoPE.
    k_frame, v_frame : torch.Tensor, optional
        fp32 ``[num_layers, num_kv_heads, head_dim, head_dim]``: what centered keys, and values, are multiplied by in
        place of their rotation. An engine's queries take up the inverse of the one and its weights that of the other;
        here both are undone on reading, which is the same.
    end_cuts : sequence of float
        Of :func:`~saw_trtllm.backends.reference.int4.quantize`: a row's ends are chosen. No engine's writer does so.
    """

    def __init__(
        self,
        k_format: KVFormat,
        v_format: KVFormat | None = None,
        k_center: torch.Tensor | None = None,
        k_frame: torch.Tensor | None = None,
        v_frame: torch.Tensor | None = None,
        end_cuts: Sequence[float] = (),
    ) -> None:
        self.k_format = k_format
        self.v_format = v_format or k_format
        self.k_center = k_center
        self.end_cuts = tuple(end_cuts)
        self._k_frame, self._v_frame = (
            None if f is None else (f, torch.linalg.inv(f.double()).float()) for f in (k_frame, v_frame)
        )

    @classmethod
    def calibrated(
        cls, k_format: KVFormat, v_format: KVFormat, calibration: Calibration, end_cuts: Sequence[float] = ()
    ) -> QuantizedRows:
        """With all levers of a calibration."""
        c = calibration
        levers = {"k_center": c.k_center, "k_frame": c.k_frame, "v_frame": c.v_frame}
        tensors = {name: torch.from_numpy(lever) for name, lever in levers.items()}
        return cls(k_format, v_format, **tensors, end_cuts=end_cuts)

    def quantize(self, layer: int, k: torch.Tensor, v: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Center, rotate or frame, quantize; and all the way back."""
        if self.k_center is not None:
            center = self.k_center[layer].to(k.device)
            k = self._round(k - center, layer, self._k_frame, self.k_format, is_key=True) + center
        else:
            k = self._round(k, layer, self._k_frame, self.k_format, is_key=True)
        return k, self._round(v, layer, self._v_frame, self.v_format, rotated=self.v_format.rotate_v)

    def _round(
        self,
        x: torch.Tensor,
        layer: int,
        frame: tuple[torch.Tensor, torch.Tensor] | None,
        kv_format: KVFormat,
        rotated: bool = True,
        is_key: bool = False,
    ) -> torch.Tensor:
        def rounded(y: torch.Tensor) -> torch.Tensor:
            if is_key and kv_format.kv == "saw_k8v4":
                return dequantize(*quantize_8bit(y))
            return dequantize(*quantize(y, kv_format.range_factor, self.end_cuts))

        if frame is None or not rotated:
            return in_rotation(x, kv_format.hadamard_order if rotated else 1, rounded)
        there, back = (f[layer].to(x.device) for f in frame)
        return (rounded(x.transpose(0, 1) @ there) @ back).transpose(0, 1)

    def layer_bytes(self, layer: int, num_kv_heads: int, head_dim: int) -> float:
        """Both rows."""
        return num_kv_heads * (self.k_format.k_row_bytes + self.v_format.row_bytes)


class Fp8(TokenwiseQuantizer):
    """Rows of fp8 e4m3 without scales: what a Hopper GPU's users take today, at twice the bytes. Not in an engine."""

    def quantize(self, layer: int, k: torch.Tensor, v: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Round, and clip to the largest number."""
        return _fp8(k), _fp8(v)

    def layer_bytes(self, layer: int, num_kv_heads: int, head_dim: int) -> float:
        """A byte for each number."""
        return 2 * num_kv_heads * head_dim


def _fp8(x: torch.Tensor) -> torch.Tensor:
    largest = torch.finfo(torch.float8_e4m3fn).max
    return x.clamp(-largest, largest).to(torch.float8_e4m3fn).float()


class SkipLayers:
    """Another quantizer with some layers left to a second one.

    Parameters
    ----------
    inner : KVQuantizer
    layers : collection of int
        The layers that are left.
    exact : KVQuantizer
        What takes them, such as :class:`Exact`.
    """

    def __init__(self, inner: KVQuantizer, layers: Collection[int], exact: KVQuantizer) -> None:
        self.inner = inner
        self.layers = frozenset(layers)
        self.exact = exact
        self.tokenwise = inner.tokenwise

    def quantize(self, layer: int, k: torch.Tensor, v: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """The inner quantizer's, or the other's."""
        return (self.exact if layer in self.layers else self.inner).quantize(layer, k, v)

    def first_exact(self, lengths: torch.Tensor) -> torch.Tensor | None:
        """The inner quantizer's."""
        return self.inner.first_exact(lengths)

    def layer_bytes(self, layer: int, num_kv_heads: int, head_dim: int) -> float:
        """The bytes of whichever keeps the layer."""
        return (self.exact if layer in self.layers else self.inner).layer_bytes(layer, num_kv_heads, head_dim)


def round_rows(x: torch.Tensor, order: int, range_factor: float = 1.0) -> torch.Tensor:
    """Rotate the rows ``[..., head_dim]``, quantize them to 4 bits, and take both back, in fp32."""
    return in_rotation(x, order, lambda y: dequantize(*quantize(y, range_factor)))


def in_rotation(x: torch.Tensor, order: int, change: Callable[[torch.Tensor], torch.Tensor]) -> torch.Tensor:
    """Rotate the rows ``[..., head_dim]``, change them, and rotate them back, in fp32."""
    matrix = torch.from_numpy(hadamard(order)).to(x.device)

    def rotated(y: torch.Tensor) -> torch.Tensor:
        return (y.unflatten(-1, (-1, order)) @ matrix).flatten(-2) if order > 1 else y

    return rotated(change(rotated(x)))


def bytes_per_token(quantizer: KVQuantizer, num_layers: int, num_kv_heads: int, head_dim: int) -> float:
    """Bytes of cache that a token takes over all layers."""
    return sum(quantizer.layer_bytes(i, num_kv_heads, head_dim) for i in range(num_layers))
