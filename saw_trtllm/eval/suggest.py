"""Which layers to keep exact: those that pay most for the bytes they cost."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch

from saw_trtllm.backends.reference.quantizers import KVQuantizer, SkipLayers
from saw_trtllm.backends.reference.window import WindowModel
from saw_trtllm.eval.metrics import Quality, evaluate

#: Layers at most that are measured together.
_MAX_TOGETHER = 4
#: A layer is worth keeping if more of the loss is its own than so many times its share of the memory.
_WORTH = 1.5


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
    bytes_per_token : float
        Bytes of cache with these layers kept.
    gain_per_kib : float
        Nats of divergence gone for each KiB more per token.
    """

    layers: list[int]
    kl_mean: float
    gain: float
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
        """Layers that pay clearly more than their share, ascending; none where the loss is spread evenly."""
        best = [x.layers[0] for x in self.layers[:_MAX_TOGETHER] if x.gain > _WORTH / len(self.layers)]
        return sorted(best)


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
    base = (whole.kl_mean, whole.bytes_per_token)
    layers = sorted((_kept([i], q, *base) for i, q in enumerate(single)), key=lambda x: -x.gain_per_kib)
    order = [x.layers[0] for x in layers]
    sets = [tuple(order[:n]) for n in range(2, _largest_set(num_layers) + 1)]
    together = [
        _kept(list(s), q, *base) for s, q in zip(sets, _measure(model, windows, quantizer, sets, progress), strict=True)
    ]
    return Suggestion(*base, layers, [layers[0], *together])


def _largest_set(num_layers: int) -> int:
    """All layers together would be no quantized cache."""
    return max(1, min(_MAX_TOGETHER, num_layers - 1))


def _measure(
    model: WindowModel,
    windows: torch.Tensor,
    quantizer: KVQuantizer,
    sets: list[tuple[int, ...]],
    progress: Callable[[], None] | None,
) -> list[Quality]:
    caches = {str(s): SkipLayers(quantizer, s, model.exact) for s in sets}
    return list(evaluate(model, windows, caches, progress).values())


def _kept(layers: list[int], quality: Quality, kl_mean: float, bytes_per_token: float) -> Kept:
    gone, more = kl_mean - quality.kl_mean, quality.bytes_per_token - bytes_per_token
    return Kept(
        layers=layers,
        kl_mean=quality.kl_mean,
        gain=gone / kl_mean if kl_mean else 0.0,
        bytes_per_token=quality.bytes_per_token,
        gain_per_kib=gone / (more / 1024) if more else 0.0,
    )
