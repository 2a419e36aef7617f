"""Answers of the models that generate: parts of texts to tensors."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from saw_trtllm.runtime.parts import Part
from saw_trtllm.runtime.tokenizer import Tokenizer
from saw_trtllm.serve.request import Generation


def tokens_and_text(generation: Generation, part: Part, tokenizer: Tokenizer | None) -> dict[str, np.ndarray]:
    """Outputs of ``tensorrt_llm`` for a part of a text.

    Parameters
    ----------
    generation : Generation
        What was asked.
    part : Part
    tokenizer : Tokenizer or None
        The runtime's own; None gives no text.

    Returns
    -------
    dict
        Each tensor with a batch dimension of 1 in front.
    """
    ids = [*generation.prompt, *part.token_ids] if generation.include_input else part.token_ids
    return {
        "output_ids": np.array([[ids]], np.int32),
        "sequence_length": np.array([[len(ids)]], np.int32),
        "text": np.array([[text(generation, part, tokenizer).encode()] if tokenizer else []], object),
        **results(generation, part),
    }


def results(generation: Generation, part: Part) -> dict[str, np.ndarray]:
    """The outputs that a request asked for, each with a batch dimension of 1 in front."""
    tensors: dict[str, np.ndarray] = {}
    if generation.return_num_input_tokens:
        tensors["num_input_tokens"] = np.array([[len(generation.prompt)]], np.int32)
    if generation.return_num_output_tokens:
        tensors["num_output_tokens"] = np.array([[len(part.token_ids)]], np.int32)
    if generation.return_num_reused_tokens:
        tensors["num_reused_tokens"] = np.array([[part.num_reused_tokens]], np.int32)
    if generation.params.logprobs:
        tensors["cum_log_probs"] = np.array([[part.cumulative_logprob]], np.float32)
        tensors["output_log_probs"] = np.array([[part.logprobs or []]], np.float32)
    if part.context_logits is not None:
        tensors["context_logits"] = part.context_logits[None].astype(np.float32)
    if part.generation_logits is not None:
        tensors["generation_logits"] = part.generation_logits[None, None].astype(np.float32)
    return tensors


def text(generation: Generation, part: Part, tokenizer: Tokenizer) -> str:
    """The part's text, after the prompt as the client wrote it where the output has the prompt."""
    if not generation.include_input:
        return part.text
    prompt = tokenizer.decode(generation.prompt) if generation.prompt_text is None else generation.prompt_text
    return prompt + part.leading + part.text


def stack(rows: Sequence[Mapping[str, np.ndarray]]) -> dict[str, np.ndarray]:
    """Outputs for several prompts in one.

    Parameters
    ----------
    rows : sequence of dict
        What :func:`tokens_and_text` gave for each prompt.

    Returns
    -------
    dict
        Each tensor with as many rows, filled up with zeros where a prompt has less than the largest of it or none:
        ``sequence_length`` says how many tokens count.
    """
    stacked = {}
    for name, first in {k: v for row in rows for k, v in row.items()}.items():
        arrays = [row.get(name, np.zeros((1, *[0] * (first.ndim - 1)), first.dtype))[0] for row in rows]
        out = np.zeros((len(rows), *np.max([a.shape for a in arrays], axis=0)), first.dtype)
        for i, array in enumerate(arrays):
            place = (i, *map(slice, array.shape))
            out[place] = array
        stacked[name] = out
    return stacked
