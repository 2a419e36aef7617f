"""How far a model with a quantized cache is from the same model with an exact one, token by token."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field

import torch

from saw_trtllm.backends.reference.quantizers import KVQuantizer, bytes_per_token
from saw_trtllm.backends.reference.window import History, WindowModel
from saw_trtllm.errors import CheckpointError

#: Predictions of a window whose mean divergence counts as one observation: neighbours depend on each other.
_PIECE = 64
#: Logits that are held at a time, of one model: 256 MiB, and on a CPU what fits its cache and glibc's free list.
_MAX_LOGITS, _MAX_LOGITS_CPU = 1 << 26, 1 << 22


@dataclass
class Quality:
    """What a cache does to a model's predictions over all tokens of a text.

    Losses are in nats per token; the divergence is KL(exact || quantized) of the next-token distribution.

    Attributes
    ----------
    bytes_per_token : float
        Bytes of cache over all layers.
    nats, nats_lost : float
        Cross-entropy, and how much of it the cache adds.
    perplexity : float
    kl_mean, kl_p99, kl_max : float
    kl_error : float
        Standard error of ``kl_mean``, over pieces of about 64 tokens.
    top1_agreement : float
        Share of tokens at which both models hold the same token for the likeliest.
    kl_by_position : dict of int to float
        Mean divergence of the tokens whose context is at most the key's length, and longer than the key before.
    greedy_agreement : float or None
        Share of a greedy continuation that passes before it first differs from the exact cache's, mean over prompts.
    greedy_identical : float or None
        Share of prompts whose whole continuation is the same.
    """

    bytes_per_token: float
    nats: float
    nats_lost: float
    perplexity: float
    kl_mean: float
    kl_p99: float
    kl_max: float
    kl_error: float
    top1_agreement: float
    kl_by_position: dict[int, float] = field(default_factory=dict)
    greedy_agreement: float | None = None
    greedy_identical: float | None = None


def evaluate(
    model: WindowModel,
    windows: torch.Tensor,
    quantizers: Mapping[str, KVQuantizer],
    progress: Callable[[], None] | None = None,
) -> dict[str, Quality]:
    """Measure caches against the exact one, teacher-forced.

    Parameters
    ----------
    model : WindowModel
    windows : torch.Tensor
        int64 ``[num_windows, T]``: texts that have nothing to do with each other. The first token of each is given, all
        others are predicted.
    quantizers : mapping of str to KVQuantizer
    progress : callable, optional
        Called after each window of each quantizer.

    Returns
    -------
    dict of str to Quality
        In the order of ``quantizers``.

    Raises
    ------
    CheckpointError
        If the model computes NaN or infinite numbers.
    """
    return qualities(model, quantizers, measure(model, windows, quantizers, progress))


def qualities(
    model: WindowModel, quantizers: Mapping[str, KVQuantizer], measured: Mapping[str, Sums]
) -> dict[str, Quality]:
    """What :func:`measure` gave, in numbers."""
    c = model.config
    shape = (c.num_hidden_layers, c.num_key_value_heads, c.head_size)
    return {name: sums.quality(bytes_per_token(quantizers[name], *shape)) for name, sums in measured.items()}


def measure(
    model: WindowModel,
    windows: torch.Tensor,
    quantizers: Mapping[str, KVQuantizer],
    progress: Callable[[], None] | None = None,
    original: WindowModel | None = None,
) -> dict[str, Sums]:
    """Like :func:`evaluate`, token by token: for comparisons of caches with each other.

    With the ``original`` of a model whose weights are quantized, it is that one's predictions, with an exact cache,
    that all are measured against.
    """

    def read(window: torch.Tensor, exact: torch.Tensor) -> Iterator[tuple[str, torch.Tensor]]:
        for name, quantizer in quantizers.items():
            same = quantizer is model.exact and original is None
            yield name, exact if same else model.hidden(window[None], quantizer)[0]

    return measure_read(model, windows, read, progress, original)


def measure_read(
    model: WindowModel,
    windows: torch.Tensor,
    read: Callable[[torch.Tensor, torch.Tensor], Iterable[tuple[str, torch.Tensor]]],
    progress: Callable[[], None] | None = None,
    original: WindowModel | None = None,
) -> dict[str, Sums]:
    """The same of whatever reads windows.

    Parameters
    ----------
    model, windows, progress, original
        As for :func:`measure`.
    read : callable
        Takes a window ``[T]`` and what ``lm_head`` is given with an exact cache, fp32 ``[T, hidden_size]``; gives the
        same with each of the caches, by name.
    """
    sums: dict[str, Sums] = defaultdict(Sums)
    for window in windows:
        exact = (original or model).hidden(window[None])[0]
        if not exact.isfinite().all():
            raise CheckpointError(
                f"the model computes NaN or infinite numbers in {model.config.dtype} with an exact cache: use the "
                "dtype that it was trained in"
            )
        hidden = {}
        for name, rows in read(window, exact):
            hidden[name] = rows
            if progress is not None:
                progress()
        _compare(model, original or model, window, exact, hidden, sums)
    return dict(sums)


def _compare(
    model: WindowModel,
    original: WindowModel,
    window: torch.Tensor,
    exact: torch.Tensor,
    hidden: Mapping[str, torch.Tensor],
    sums: Mapping[str, Sums],
) -> None:
    """Add a window ``[T]`` to all sums, from what ``lm_head`` is given with each cache, ``[T, hidden_size]``."""
    targets = window[1:].to(exact.device)
    size = max(1, (_MAX_LOGITS if exact.is_cuda else _MAX_LOGITS_CPU) // model.config.vocab_size)
    for start in range(0, len(targets), size):
        tile = slice(start, min(start + size, len(targets)))
        p = original.logits(exact[tile]).log_softmax(-1)
        for name, rows in hidden.items():
            q = p if rows is exact else model.logits(rows[tile]).log_softmax(-1)
            sums[name].add(p, q, targets[tile], start)


def greedy_agreement(
    model: WindowModel,
    prompts: torch.Tensor,
    quantizers: Mapping[str, KVQuantizer],
    num_tokens: int = 128,
    progress: Callable[[], None] | None = None,
) -> dict[str, tuple[float, float]]:
    """Compare greedy continuations with those of the exact cache.

    Parameters
    ----------
    model : WindowModel
    prompts : torch.Tensor
        int64 ``[B, T]``.
    quantizers : mapping of str to KVQuantizer
    num_tokens : int
        Length of a continuation.
    progress : callable, optional
        Called after each quantizer.

    Returns
    -------
    dict of str to tuple of float
        Share of a continuation before the first difference, and share of prompts without one.
    """
    exact = continuations(model, prompts, model.exact, num_tokens)
    results = {}
    for name, quantizer in quantizers.items():
        ours = exact if quantizer is model.exact else continuations(model, prompts, quantizer, num_tokens)
        same = (ours == exact).long().cumprod(dim=1).sum(dim=1)
        results[name] = (float(same.double().mean()) / num_tokens, float((same == num_tokens).double().mean()))
        if progress is not None:
            progress()
    return results


def continuations(model: WindowModel, prompts: torch.Tensor, quantizer: KVQuantizer, num_tokens: int) -> torch.Tensor:
    """Greedy continuations int64 ``[B, num_tokens]`` of prompts ``[B, T]``, all tokens read from the cache."""
    history = History(quantizer, model.config.num_hidden_layers)
    tokens, chosen = prompts, []
    for _ in range(num_tokens):
        tokens = model.logits(model.hidden(tokens, history=history)[:, -1]).argmax(-1, keepdim=True)
        chosen.append(tokens)
    return torch.cat(chosen, dim=1).cpu()


@dataclass(frozen=True)
class Difference:
    """A cache's mean divergence less another's, on the same text, with its standard error over pieces of it."""

    mean: float
    error: float

    @property
    def is_real(self) -> bool:
        """Whether it lies beyond two standard errors."""
        return abs(self.mean) > 2 * self.error


def difference(one: Sums, other: Sums) -> Difference:
    """Compare two caches piece by piece: what makes a piece hard for both drops out."""
    pieces = one.kl_pieces() - other.kl_pieces()
    return Difference(float(pieces.mean()), standard_error(pieces))


def differences(measured: Mapping[str, Sums]) -> dict[str, dict[str, Difference]]:
    """Each cache compared with each other: ``[one][other]`` is one's divergence less the other's."""
    return {
        one: {other: difference(a, b) for other, b in measured.items() if other != one} for one, a in measured.items()
    }


def standard_error(pieces: torch.Tensor) -> float:
    """Of the mean of observations ``[n]``; infinite where there is one alone."""
    return float(pieces.std()) / math.sqrt(len(pieces)) if len(pieces) > 1 else math.inf


class Sums:
    """Per-token measures of one quantizer, gathered window by window."""

    def __init__(self) -> None:
        self._loss: list[torch.Tensor] = []
        self._exact_loss: list[torch.Tensor] = []
        self._kl: list[torch.Tensor] = []
        self._agree: list[torch.Tensor] = []
        self._context: list[torch.Tensor] = []
        self._lengths: list[int] = []

    def add(self, p: torch.Tensor, q: torch.Tensor, targets: torch.Tensor, start: int) -> None:
        """Add predictions ``start`` and following of a window: log probabilities of either cache, ``[n, vocab]``."""
        if start == 0:
            self._lengths.append(0)
        self._lengths[-1] += len(targets)
        self._exact_loss.append(-p.gather(1, targets[:, None])[:, 0].cpu())
        self._loss.append(-q.gather(1, targets[:, None])[:, 0].cpu())
        self._kl.append((p.exp() * (p - q)).sum(-1).clamp_min(0).cpu())
        self._agree.append((p.argmax(-1) == q.argmax(-1)).cpu())
        self._context.append(torch.arange(start, start + len(targets)) + 1)

    def kl_pieces(self) -> torch.Tensor:
        """Mean divergence of each piece of about 64 consecutive tokens of a window, fp64 ``[n]``."""
        windows = torch.cat(self._kl).double().split(self._lengths)
        pieces = [p for w in windows for p in w.tensor_split(max(1, len(w) // _PIECE))]
        return torch.stack([piece.mean() for piece in pieces])

    def quality(self, cache_bytes: float) -> Quality:
        """All of it in numbers."""
        loss, exact, kl, agree, context = (
            torch.cat(t).double() for t in (self._loss, self._exact_loss, self._kl, self._agree, self._context)
        )
        nats = float(loss.mean())
        by_position, last = {}, int(context.max())
        bounds = [b for b in (2**i for i in range(6, 40)) if b < last] + [last]
        for low, high in zip([0, *bounds], bounds, strict=False):
            by_position[high] = float(kl[(context > low) & (context <= high)].mean())
        return Quality(
            bytes_per_token=cache_bytes,
            nats=nats,
            nats_lost=nats - float(exact.mean()),
            perplexity=math.exp(min(nats, 700.0)),
            kl_mean=float(kl.mean()),
            # Not torch.quantile, which rejects more than 2^24 elements.
            kl_p99=float(kl.sort().values[math.ceil(0.99 * len(kl)) - 1]),
            kl_max=float(kl.max()),
            kl_error=standard_error(self.kl_pieces()),
            top1_agreement=float(agree.mean()),
            kl_by_position=by_position,
        )
