"""A text's pieces as they go from the engine to a server's models, without what came before them."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Literal, NamedTuple

import numpy as np

FinishReason = Literal["stop", "length", "cancelled"]


class Part(NamedTuple):
    """What a text has gained, small enough to be sent for every token.

    Attributes
    ----------
    number : int
        Which of its prompt's texts it is.
    text : str
    token_ids : list of int
    leading : str
        What the decoder strips from the beginning of a text.
    reason : {"stop", "length", "cancelled"} or None
        None while more of this text is to come.
    finished : bool
        Whether nothing more of this prompt comes.
    num_reused_tokens : int
        Tokens of the prompt that were found in the cache.
    logprobs : list of float or None
        Of ``token_ids``, where they were asked for.
    cumulative_logprob : float or None
        Their sum from the text's beginning.
    context_logits, generation_logits : numpy.ndarray or None
        fp32 ``[prompt tokens, vocab_size]`` and ``[len(token_ids), vocab_size]``.
    """

    number: int
    text: str
    token_ids: list[int]
    leading: str
    reason: FinishReason | None = None
    finished: bool = False
    num_reused_tokens: int = 0
    logprobs: list[float] | None = None
    cumulative_logprob: float | None = None
    context_logits: np.ndarray | None = None
    generation_logits: np.ndarray | None = None


def join(parts: Iterable[Part]) -> list[Part]:
    """One part for each text in place of all that have come of it; what ends the prompt is the last."""
    texts: dict[int, list[Part]] = {}
    for part in parts:
        texts.setdefault(part.number, []).append(part)
    joined = [text[0] if len(text) == 1 else _one(text) for text in texts.values()]
    return sorted(joined, key=lambda part: part.finished)


def _one(parts: list[Part]) -> Part:
    whole = parts[-1]._replace(
        text="".join([part.text for part in parts]),
        token_ids=[token for part in parts for token in part.token_ids],
    )
    if whole.logprobs is not None:
        whole = whole._replace(logprobs=[x for part in parts for x in part.logprobs or ()])
    if whole.generation_logits is not None:
        logits = [part.generation_logits for part in parts if part.generation_logits is not None]
        whole = whole._replace(generation_logits=np.concatenate(logits))
    return whole
