"""Log-probabilities in the two shapes that OpenAI's API has."""

from __future__ import annotations

from typing import Any

import numpy as np

from saw_trtllm.runtime.outputs import CompletionOutput
from saw_trtllm.runtime.sampling import top_logprobs
from saw_trtllm.serve.openai.model import ServedModel


def chat_logprobs(model: ServedModel, completion: CompletionOutput) -> dict[str, Any]:
    """Of a piece's tokens, for a chat completion."""
    content = []
    for token, logprob, top in text_places(completion):
        entry = _entry(model, token, logprob)
        entry["top_logprobs"] = [_entry(model, other, value) for other, value in top]
        content.append(entry)
    return {"content": content, "refusal": None}


def _entry(model: ServedModel, token: int, logprob: float) -> dict[str, Any]:
    text, data = model.token_text(token)
    return {"token": text, "logprob": max(logprob, -9999.0), "bytes": data}


#: A token, its log-probability, and the likeliest in its place; the first of a prompt has none.
Place = tuple[int, float | None, list[tuple[int, float]] | None]


def text_places(completion: CompletionOutput) -> list[tuple[int, float, list[tuple[int, float]]]]:
    """Of a piece's tokens."""
    tokens, logprobs = completion.token_ids_diff, completion.logprobs_diff or []
    return list(zip(tokens, logprobs, completion.top_logprobs_diff or [[] for _ in tokens], strict=True))


def prompt_places(tokens: list[int], logits: np.ndarray, count: int) -> list[Place]:
    """Of a prompt's tokens.

    Parameters
    ----------
    tokens : list of int
    logits : numpy.ndarray
        fp32 ``[len(tokens), vocab_size]``: what each token is followed by.
    count : int
        How many of the likeliest.
    """
    places: list[Place] = [(tokens[0], None, None)]
    for token, row in zip(tokens[1:], logits, strict=False):
        values = row.astype(np.float64)
        top = values.max()
        logprob = float(values[token] - (top + np.log(np.exp(values - top).sum())))
        places.append((token, logprob, top_logprobs(row, count) if count else []))
    return places


def completion_logprobs(model: ServedModel, places: list[Place], offset: int) -> dict[str, Any]:
    """For a completion; ``offset`` is where the first token stands in the text."""
    texts = [model.token_text(token)[0] for token, _, _ in places]
    offsets = [offset]
    for text in texts[:-1]:
        offsets.append(offsets[-1] + len(text))
    tops: list[dict[str, float | None] | None] = []
    for (token, logprob, top), text in zip(places, texts, strict=True):
        if top is None:
            tops.append(None)
            continue
        found: dict[str, float | None] = {model.token_text(other)[0]: value for other, value in top}
        tops.append({**found, text: logprob} if token not in dict(top) else found)
    return {
        "tokens": texts,
        "token_logprobs": [logprob for _, logprob, _ in places],
        "top_logprobs": tops,
        "text_offset": offsets if places else [],
    }
