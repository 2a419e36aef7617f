"""Answers of the model ``tensorrt_llm``: the runtime's output to tensors."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from saw_trtllm.runtime.outputs import RequestOutput
from saw_trtllm.runtime.tokenizer import Tokenizer
from saw_trtllm.serve.request import Generation


def answer(
    generation: Generation, output: RequestOutput, tokenizer: Tokenizer | None, request_key: int = 0
) -> dict[str, np.ndarray]:
    """Outputs of ``tensorrt_llm`` for a piece.

    Parameters
    ----------
    generation : Generation
        What was asked.
    output : RequestOutput
    tokenizer : Tokenizer or None
        The runtime's own; None gives no text.
    request_key : int
        Not 0 if ``postprocessing`` is to see whether the client is still there.

    Returns
    -------
    dict
        Each tensor with a batch dimension of 1 in front.
    """
    piece = output.outputs[0]
    ids = [*output.prompt_token_ids, *piece.token_ids_diff] if generation.include_input else piece.token_ids_diff
    tensors = {
        "output_ids": np.array([[ids]], np.int32),
        "sequence_length": np.array([[len(ids)]], np.int32),
        "text": np.array([[_text(generation, output, tokenizer).encode()] if tokenizer else []], object),
        "request_key": np.array([[request_key]], np.uint64),
    }
    if generation.return_num_input_tokens:
        tensors["num_input_tokens"] = np.array([[len(output.prompt_token_ids)]], np.int32)
    if generation.return_num_output_tokens:
        tensors["num_output_tokens"] = np.array([[len(piece.token_ids_diff)]], np.int32)
    if generation.return_num_reused_tokens:
        tensors["num_reused_tokens"] = np.array([[output.num_reused_tokens]], np.int32)
    if generation.params.logprobs:
        logprobs = piece.logprobs or []
        new = logprobs[len(logprobs) - len(piece.token_ids_diff) :]
        tensors["cum_log_probs"] = np.array([[piece.cumulative_logprob]], np.float32)
        tensors["output_log_probs"] = np.array([[new]], np.float32)
    if output.context_logits is not None:
        tensors["context_logits"] = output.context_logits[None].astype(np.float32)
    if piece.generation_logits is not None:
        tensors["generation_logits"] = piece.generation_logits[None, None].astype(np.float32)
    return tensors


def stack(rows: Sequence[Mapping[str, np.ndarray]]) -> dict[str, np.ndarray]:
    """Outputs for several prompts in one.

    Parameters
    ----------
    rows : sequence of dict
        What :func:`answer` gave for each prompt.

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


def _text(generation: Generation, output: RequestOutput, tokenizer: Tokenizer) -> str:
    """The piece's text, after the prompt as the client wrote it where the output has the prompt."""
    piece = output.outputs[0]
    if not generation.include_input:
        return piece.text_diff
    prompt = tokenizer.decode(output.prompt_token_ids) if generation.prompt_text is None else generation.prompt_text
    return prompt + piece.leading_space + piece.text_diff
