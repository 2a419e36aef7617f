"""Which layers to keep exact: those that pay most for the bytes they cost."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch

from saw_trtllm.backends.reference.quantizers import KVQuantizer, SkipLayers, bytes_per_token
from saw_trtllm.backends.reference.window import WindowModel
from saw_trtllm.eval.metrics import measure, standard_error

#: Layers at most that are measured together.
_MAX_TOGETHER = 4
#: A layer is worth keeping if more of the loss is its own than so many times its share of the memory.
_WORTH = 1.5
#: Standard errors by which it must be more: of some dozens of layers the best are looked at, of which one or two are
#: beyond two errors by chance.
_ERRORS = 3.0


@dataclass
class Kept:
    """What keeping some layers in the model's dtype gives.

    Attributes
    ----------
    layers : list of int
    kl_mean : float
        Divergence that is left.
    gain : float
        Share of the whole cache's divergence that is gone.
    gain_error : float
        Its standard error, of differences piece by piece of the text; infinite where the text is a single piece.
    bytes_per_token : float
        Bytes of cache with these layers kept.
    gain_per_kib : float
        Nats of divergence gone for each KiB more per token.
    """

    layers: list[int]
    kl_mean: float
    gain: float
    gain_error: float
    bytes_per_token: float
    gain_per_kib: float


@dataclass
class Suggestion:
    """A sensitivity table.

    Attributes
    ----------
    kl_mean, bytes_per_token : float
        Of the cache with no layer kept.
    layers : list of Kept
        Each layer by itself, the one that pays most first.
    together : list of Kept
        The best one, the best two, and so on, measured together: gains do not simply add up.
    """

    kl_mean: float
    bytes_per_token: float
    layers: list[Kept]
    together: list[Kept]

    @property
    def worth(self) -> list[int]:
        """Layers that pay clearly more than their share, beyond what the text's length leaves to chance, ascending."""
        least = _WORTH / len(self.layers)
        return sorted(x.layers[0] for x in self.layers[:_MAX_TOGETHER] if x.gain - _ERRORS * x.gain_error > least)


class _Measured(NamedTuple):
    """A cache with these layers exact: its mean divergence, that of each piece of the text, and its size."""

    layers: list[int]
    kl_mean: float
    pieces: torch.Tensor
    bytes_per_token: float


def num_measurements(num_layers: int) -> int:
    """Caches that :func:`suggest` measures."""
    return 1 + num_layers + _largest_set(num_layers) - 1


def suggest(
    model: WindowModel, windows: torch.Tensor, quantizer: KVQuantizer, progress: Callable[[], None] | None = None
) -> Suggestion:
    """Measure ``quantizer`` with each layer exact in turn, then with the best layers together.

    Parameters
    ----------
    model : WindowModel
    windows : torch.Tensor
        int64 ``[n, T]``.
    quantizer : KVQuantizer
    progress : callable, optional
        Called after each window of each measurement.
    """
    num_layers = model.config.num_hidden_layers
    sets: list[tuple[int, ...]] = [(), *((i,) for i in range(num_layers))]
    whole, *single = _measure(model, windows, quantizer, sets, progress)
    layers = sorted((_kept(x, whole) for x in single), key=lambda x: -x.gain_per_kib)
    order = [x.layers[0] for x in layers]
    sets = [tuple(order[:n]) for n in range(2, _largest_set(num_layers) + 1)]
    together = [_kept(x, whole) for x in _measure(model, windows, quantizer, sets, progress)]
    return Suggestion(whole.kl_mean, whole.bytes_per_token, layers, [layers[0], *together])


def _largest_set(num_layers: int) -> int:
    """All layers together would be no quantized cache."""
    return max(1, min(_MAX_TOGETHER, num_layers - 1))


def _measure(
    model: WindowModel,
    windows: torch.Tensor,
    quantizer: KVQuantizer,
    sets: list[tuple[int, ...]],
    progress: Callable[[], None] | None,
) -> list[_Measured]:
    caches = {s: SkipLayers(quantizer, s, model.exact) for s in sets}
    found = measure(model, windows, {str(s): cache for s, cache in caches.items()}, progress)
    c = model.config
    shape = (c.num_hidden_layers, c.num_key_value_heads, c.head_size)
    return [
        _Measured(list(s), sums.quality(0.0).kl_mean, sums.kl_pieces(), bytes_per_token(caches[s], *shape))
        for s, sums in zip(caches, found.values(), strict=True)
    ]


def _kept(kept: _Measured, whole: _Measured) -> Kept:
    gone, more = whole.kl_mean - kept.kl_mean, kept.bytes_per_token - whole.bytes_per_token
    differences = whole.pieces - kept.pieces
    error = standard_error(differences)
    return Kept(
        layers=kept.layers,
        kl_mean=kept.kl_mean,
        gain=gone / whole.kl_mean if whole.kl_mean else 0.0,
        gain_error=error / whole.kl_mean if whole.kl_mean else 0.0,
        bytes_per_token=kept.bytes_per_token,
        gain_per_kib=gone / (more / 1024) if more else 0.0,
    )
