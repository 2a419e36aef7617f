"""Choose the next token on the CPU."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from saw_trtllm.runtime.sampling_params import SamplingParams


class SamplingState(NamedTuple):
    """What the choice of one token depends on.

    Attributes
    ----------
    params : SamplingParams
    prompt, generated : sequence of int
        Tokens so far, but for those not known yet.
    banned : sequence of int
        Tokens that may not come now: the ends before ``min_tokens``, and what would complete a bad word.
    number : int, optional
        Number of the draw: how many tokens of the text come before this one, known or not. By default all are known.
    mask : numpy.ndarray, optional
        Which tokens may come: uint32 ``[ceil(vocab_size / 32)]``, token i in bit ``i % 32`` of word ``i // 32``.
    """

    params: SamplingParams
    prompt: Sequence[int]
    generated: Sequence[int]
    banned: Sequence[int] = ()
    number: int | None = None
    mask: np.ndarray | None = None

    @property
    def draw(self) -> int:
        """The number of the draw."""
        return len(self.generated) if self.number is None else self.number


def sample(logits: np.ndarray, state: SamplingState) -> tuple[int, float]:
    """Draw a token.

    The random number comes from a counter-based generator (Philox, Salmon et al. 2011) keyed by the request's seed and
    counted by the token's index, so it does not depend on the batch.

    Parameters
    ----------
    logits : numpy.ndarray
        fp32 ``[vocab_size]``.
    state : SamplingState

    Returns
    -------
    tuple of (int, float)
        The token, and its log-probability under the model (before temperature, penalties and cuts).
    """
    params = state.params
    adjusted = _penalize(logits.astype(np.float64), state)
    token = int(adjusted.argmax()) if params.greedy else _draw(adjusted, params, state.draw)
    return token, _logprob(logits.astype(np.float64), token) if params.logprobs else 0.0


def token_logprobs(logits: np.ndarray, tokens: Sequence[int]) -> list[float]:
    """Log-probabilities under the model of tokens, one for each row of fp32 logits ``[len(tokens), vocab_size]``."""
    return [_logprob(row.astype(np.float64), token) for row, token in zip(logits, tokens, strict=True)]


def top_logprobs(logits: np.ndarray, count: int) -> list[tuple[int, float]]:
    """The likeliest tokens and their log-probabilities under the model, the likeliest first, equals by token.

    Parameters
    ----------
    logits : numpy.ndarray
        fp32 ``[vocab_size]``.
    count : int
    """
    values = logits.astype(np.float64)
    rank = min(count, len(values)) - 1
    least = -np.partition(-values, rank)[rank]
    order = np.flatnonzero(values >= least)  # all that equal the last: which of them it is, a partition does not say
    order = order[np.argsort(-values[order], kind="stable")][:count]
    total = _log_sum(values)
    return [(int(token), float(values[token] - total)) for token in order]


def _penalize(logits: np.ndarray, state: SamplingState) -> np.ndarray:
    """The logits to choose by, rounded to the fp32 that they came in: equals are then equal on every backend."""
    params = state.params
    if params.logit_bias:
        logits[list(params.logit_bias)] += np.array(list(params.logit_bias.values()), np.float32)
    if params.repetition_penalty != 1.0:
        seen = np.unique(np.concatenate([state.prompt, state.generated]).astype(np.int64))
        values = logits[seen]
        logits[seen] = np.where(values > 0, values / params.repetition_penalty, values * params.repetition_penalty)
    if (params.presence_penalty or params.frequency_penalty) and len(state.generated):
        tokens, counts = np.unique(np.asarray(state.generated, dtype=np.int64), return_counts=True)
        logits[tokens] -= params.presence_penalty + params.frequency_penalty * counts
    logits[list(state.banned)] = -np.inf
    if state.mask is not None:
        logits[np.unpackbits(state.mask.view(np.uint8), count=len(logits), bitorder="little") == 0] = -np.inf
    with np.errstate(over="ignore"):
        return logits.astype(np.float32).astype(np.float64)


def _draw(logits: np.ndarray, params: SamplingParams, index: int) -> int:
    order = np.arange(len(logits))
    if params.top_k and params.top_k < len(logits):
        least = -np.partition(-logits, params.top_k - 1)[params.top_k - 1]
        order = order[~(logits < least)]
    if params.top_k or params.top_p is not None:
        # A stable order makes ties a matter of the token's id, not of the sort.
        order = order[np.argsort(-logits[order], kind="stable")][: params.top_k or None]
    temperature = 1.0 if params.temperature is None else params.temperature
    with np.errstate(over="ignore"):  # a temperature near 0 sends all but the likeliest to -inf
        probs = np.exp((logits[order] - logits[order].max()) / temperature)
    if params.min_p:
        kept = probs >= params.min_p * probs.max()
        order, probs = order[kept], probs[kept]
    probs /= probs.sum()
    cumulative = probs.cumsum()
    if params.top_p is not None and params.top_p < 1.0:
        keep = int(np.searchsorted(cumulative, params.top_p)) + 1
        order, cumulative = order[:keep], cumulative[:keep]
    generator = np.random.Generator(np.random.Philox(key=params.seed or 0, counter=index))
    chosen = np.searchsorted(cumulative, generator.random() * cumulative[-1], side="right")
    return int(order[min(chosen, len(order) - 1)])


def _logprob(logits: np.ndarray, token: int) -> float:
    return float(logits[token] - _log_sum(logits))


def _log_sum(logits: np.ndarray) -> float:
    top = logits.max()
    return top + np.log(np.exp(logits - top).sum())
