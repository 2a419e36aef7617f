"""Which layers to give more bits: those that pay most for the bytes they cost."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import NamedTuple

import torch

from saw_trtllm.backends.reference.quantizers import KVQuantizer, SkipLayers, bytes_per_token
from saw_trtllm.backends.reference.window import WindowModel
from saw_trtllm.eval.metrics import Sums, measure, measure_read, standard_error

#: Layers at most that are measured together, where no budget says how many.
_MAX_TOGETHER = 4
#: A layer is worth its bytes if it gains more than so many times what a layer does on average.
_WORTH = 1.5
#: Standard errors by which it must be more: of some dozens of layers the best are looked at, of which one or two are
#: beyond two errors by chance.
_ERRORS = 3.0


class Bits(NamedTuple):
    """Layers of a 4-bit cache that have more bits."""

    exact: tuple[int, ...] = ()
    """In the model's dtype, by ``--kv_skip_layers``."""
    wide: tuple[int, ...] = ()
    """With keys of 8 bits, by ``--kv_bits``."""

    def __add__(self, other: Bits) -> Bits:  # type: ignore[override]
        return Bits(self.exact + other.exact, self.wide + other.wide)

    def ascending(self) -> Bits:
        """The same, in the layers' order."""
        return Bits(tuple(sorted(self.exact)), tuple(sorted(self.wide)))

    @property
    def layers(self) -> set[int]:
        """All of them."""
        return {*self.exact, *self.wide}

    @property
    def flags(self) -> str:
        """As ``saw-build`` takes them."""
        skipped, wide = (",".join(map(str, x)) for x in self.ascending())
        return " ".join(
            [*([f"--kv_skip_layers {skipped}"] if skipped else []), *([f"--kv_bits 8/4:{wide}"] if wide else [])]
        )


@dataclass
class Kept:
    """What more bits for some layers give.

    Attributes
    ----------
    layers : list of int
        In the model's dtype.
    kl_mean : float
        Divergence that is left.
    gain : float
        Share of the whole cache's divergence that is gone.
    gain_error : float
        Its standard error, of differences piece by piece of the text; infinite where the text is a single piece.
    bytes_per_token : float
        Bytes of cache with them.
    gain_per_kib : float
        Nats of divergence gone for each KiB more per token.
    k8_layers : list of int
        With keys of 8 bits.
    """

    layers: list[int]
    kl_mean: float
    gain: float
    gain_error: float
    bytes_per_token: float
    gain_per_kib: float
    k8_layers: list[int] = field(default_factory=list)

    @property
    def bits(self) -> Bits:
        """Which layers, in one."""
        return Bits(tuple(self.layers), tuple(self.k8_layers))


@dataclass
class Suggestion:
    """A sensitivity table.

    Attributes
    ----------
    kl_mean, bytes_per_token : float
        Of the cache as it is.
    layers : list of Kept
        Each layer by itself, the one that pays most first.
    together : list of Kept
        The best one, the best two, and so on, measured together: gains do not simply add up. For a budget, the best one
        and all that were chosen for it.
    budget : float or None
        Bytes of a token over all layers.
    """

    kl_mean: float
    bytes_per_token: float
    layers: list[Kept]
    together: list[Kept]
    budget: float | None = None

    @property
    def worth(self) -> Bits:
        """Layers that pay, beyond what the text's length leaves to chance.

        They are those that were chosen for the budget, or without one the few that gain clearly more than a layer does
        on average.
        """
        if self.budget is not None:
            return chosen(self.layers, self.bytes_per_token, self.budget)
        exact, wide = ([x for x in self.layers if bool(x.k8_layers) is kind] for kind in (False, True))
        # All layers in the model's dtype gain all of the divergence.
        even = {False: 1 / len(exact), True: sum(x.gain for x in wide) / max(1, len(wide))}
        found = Bits()
        for x in self.layers[:_MAX_TOGETHER]:
            is_more = x.gain - _ERRORS * x.gain_error > _WORTH * even[bool(x.k8_layers)]
            found += x.bits if is_more and not x.bits.layers & found.layers else Bits()
        return found.ascending()


def chosen(layers: list[Kept], bytes_per_token: float, budget: float) -> Bits:
    """Of layers by themselves, the best first, those whose gain is beyond chance, while they fit a budget."""
    found = Bits()
    for x in layers:
        more = x.bytes_per_token - bytes_per_token
        fits = more <= budget - bytes_per_token
        if fits and x.gain > _ERRORS * x.gain_error and not x.bits.layers & found.layers:
            found += x.bits
            budget -= more
    return found.ascending()


class _Measured(NamedTuple):
    """A cache with these layers' bits: its mean divergence, that of each piece of the text, and its size."""

    bits: Bits
    kl_mean: float
    pieces: torch.Tensor
    bytes_per_token: float


def num_measurements(num_layers: int, *, wide: bool = False, budget: float | None = None) -> int:
    """Caches that :func:`suggest` measures at most."""
    return 1 + num_layers * (1 + wide) + (_largest_set(num_layers) - 1 if budget is None else 1)


def suggest(
    model: WindowModel,
    windows: torch.Tensor,
    quantizer: KVQuantizer,
    progress: Callable[[], None] | None = None,
    *,
    wide: KVQuantizer | None = None,
    budget: float | None = None,
) -> Suggestion:
    """Measure ``quantizer`` with more bits for each layer in turn, then for the best layers together.

    Parameters
    ----------
    model : WindowModel
    windows : torch.Tensor
        int64 ``[n, T]``.
    quantizer : KVQuantizer
    progress : callable, optional
        Called after each window of each measurement.
    wide : KVQuantizer, optional
        The same cache with keys of 8 bits; without it layers are tried in the model's dtype alone.
    budget : float, optional
        Bytes of a token over all layers, to choose for.
    """
    num_layers = model.config.num_hidden_layers
    whole, *single = _measure_layers(model, windows, quantizer, wide, progress)
    layers = sorted((_kept(x, whole) for x in single), key=lambda x: -x.gain_per_kib)
    if budget is None:
        sets = _best(layers, _largest_set(num_layers))
    else:
        sets = [x for x in [chosen(layers, whole.bytes_per_token, budget)] if len(x.layers) > 1]
    together = [_kept(x, whole) for x in _measure(model, windows, quantizer, wide, sets, progress)]
    return Suggestion(whole.kl_mean, whole.bytes_per_token, layers, [layers[0], *together], budget)


def _best(layers: list[Kept], count: int) -> list[Bits]:
    """The best two, three and so on, each layer once."""
    found, sets = layers[0].bits, []
    for x in layers[1:]:
        if not x.bits.layers & found.layers and len(found.layers) < count:
            found += x.bits
            sets.append(found)
    return sets


def _largest_set(num_layers: int) -> int:
    """All layers together would be no quantized cache."""
    return max(1, min(_MAX_TOGETHER, num_layers - 1))


def _measure_layers(
    model: WindowModel,
    windows: torch.Tensor,
    quantizer: KVQuantizer,
    wide: KVQuantizer | None,
    progress: Callable[[], None] | None,
) -> list[_Measured]:
    """The cache as it is, then each layer with more bits of either kind."""
    layers = range(model.config.num_hidden_layers)
    tried = [bits for i in layers for bits in (Bits(exact=(i,)), Bits(wide=(i,)))[: 1 if wide is None else 2]]
    sets = [Bits(), *tried]
    others = [model.exact] if wide is None else [model.exact, wide]

    def read(window: torch.Tensor, _: torch.Tensor) -> Iterator[tuple[str, torch.Tensor]]:
        yield str(sets[0]), model.hidden(window[None], quantizer)[0]
        for bits, rows in zip(tried, model.hidden_by_layer(window[None], quantizer, others), strict=True):
            yield str(bits), rows[0]

    return _sized(model, _caches(model, quantizer, wide, sets), measure_read(model, windows, read, progress))


def _measure(
    model: WindowModel,
    windows: torch.Tensor,
    quantizer: KVQuantizer,
    wide: KVQuantizer | None,
    sets: list[Bits],
    progress: Callable[[], None] | None,
) -> list[_Measured]:
    caches = _caches(model, quantizer, wide, sets)
    return _sized(model, caches, measure(model, windows, {str(s): cache for s, cache in caches.items()}, progress))


def _caches(
    model: WindowModel, quantizer: KVQuantizer, wide: KVQuantizer | None, sets: list[Bits]
) -> dict[Bits, KVQuantizer]:
    return {s: SkipLayers(SkipLayers(quantizer, s.wide, wide or quantizer), s.exact, model.exact) for s in sets}


def _sized(model: WindowModel, caches: dict[Bits, KVQuantizer], found: Mapping[str, Sums]) -> list[_Measured]:
    c = model.config
    shape = (c.num_hidden_layers, c.num_key_value_heads, c.head_size)
    return [
        _Measured(s, found[str(s)].quality(0.0).kl_mean, found[str(s)].kl_pieces(), bytes_per_token(cache, *shape))
        for s, cache in caches.items()
    ]


def _kept(kept: _Measured, whole: _Measured) -> Kept:
    gone, more = whole.kl_mean - kept.kl_mean, kept.bytes_per_token - whole.bytes_per_token
    differences = whole.pieces - kept.pieces
    error = standard_error(differences)
    return Kept(
        layers=list(kept.bits.exact),
        kl_mean=kept.kl_mean,
        gain=gone / whole.kl_mean if whole.kl_mean else 0.0,
        gain_error=error / whole.kl_mean if whole.kl_mean else 0.0,
        bytes_per_token=kept.bytes_per_token,
        gain_per_kib=gone / (more / 1024) if more else 0.0,
        k8_layers=list(kept.bits.wide),
    )
