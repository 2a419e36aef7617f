"""Requests to the model ``tensorrt_llm``: tensors to prompts and sampling parameters."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any, cast

import numpy as np

from saw_trtllm.errors import RequestError
from saw_trtllm.runtime.guided_decoding import GuidedDecodingParams
from saw_trtllm.runtime.sampling_params import SamplingParams
from saw_trtllm.serve.triton import Tensors, texts


@dataclass(frozen=True)
class Generation:
    """One prompt of a request, and what is asked about it."""

    prompt: list[int]
    params: SamplingParams
    streaming: bool
    #: Whether the output begins with the prompt. As in TensorRT-LLM, never when streaming.
    include_input: bool
    return_num_input_tokens: bool
    return_num_output_tokens: bool
    return_num_reused_tokens: bool = False
    cache_salt: str = ""
    #: The prompt as the client wrote it.
    prompt_text: str | None = None


def parse(tensors: Tensors, exclude_input_in_output: bool = False) -> list[Generation]:
    """Read a request's prompts.

    Parameters
    ----------
    tensors : dict
        The inputs of ``tensorrt_llm``, each of shape ``[prompts, ...]``.
    exclude_input_in_output : bool
        For a request that does not say.

    Raises
    ------
    RequestError
        If a value is out of range, or asks for what is not supported.
    """
    return [_generation(_Row(tensors, i), exclude_input_in_output) for i in range(len(tensors["input_ids"]))]


class _Row:
    """The tensors of one prompt."""

    def __init__(self, tensors: Tensors, index: int) -> None:
        self._tensors = {name: array[index] for name, array in tensors.items()}

    def array(self, name: str) -> np.ndarray | None:
        return self._tensors.get(name)

    def scalar(self, name: str, default: Any = None) -> Any:
        """A tensor's only value as a Python number."""
        array = self.array(name)
        return default if array is None else array.reshape(-1)[0].item()

    def either(self, name: str, older: str) -> Any:
        """A scalar that has two names."""
        values = [v for v in (self.scalar(name), self.scalar(older)) if v is not None]
        if len(set(values)) > 1:
            raise RequestError(f"{name} is {values[0]} and {older}, its older name, {values[1]}: give one of them")
        return values[0] if values else None


def _generation(row: _Row, exclude_input_in_output: bool) -> Generation:
    _reject(row, "beam_width", {1}, "there is no beam search")
    _reject(row, "len_penalty", {0.0, 1.0}, "it is for beam search, which is not supported")
    _reject(row, "return_perf_metrics", {False}, "the server's metrics have times and tokens found in the cache")
    bias = row.array("embedding_bias")
    if bias is not None and bias.any():
        raise RequestError("embedding_bias is not supported: leave it out")
    ids, length = cast(np.ndarray, row.array("input_ids")), row.scalar("input_lengths")
    if not 0 <= length <= len(ids):
        raise RequestError(f"input_lengths is {length}: input_ids holds {len(ids)} tokens")
    streaming = row.scalar("streaming", False)
    return Generation(
        prompt=ids[:length].tolist(),
        params=_sampling_params(row),
        streaming=streaming,
        include_input=not streaming and not row.scalar("exclude_input_in_output", exclude_input_in_output),
        return_num_input_tokens=row.scalar("return_num_input_tokens", False),
        return_num_output_tokens=row.scalar("return_num_output_tokens", False),
        return_num_reused_tokens=row.scalar("return_num_reused_tokens", False),
        cache_salt=next(iter(texts(row.array("cache_salt"), "cache_salt")), ""),
        prompt_text=next(iter(texts(row.array("prompt"), "prompt")), None),
    )


def _reject(row: _Row, name: str, accepted: set[float], why: str) -> None:
    value = row.scalar(name)
    if value is not None and value not in accepted:
        raise RequestError(f"{name} is {value}, which is not supported: {why}")


def _sampling_params(row: _Row) -> SamplingParams:
    """What the request gives; for the rest the runtime's defaults hold."""
    given: dict[str, Any] = {
        "max_tokens": row.scalar("request_output_len"),
        "min_tokens": row.either("min_tokens", "min_length"),
        "seed": row.either("seed", "random_seed"),
        "top_k": row.scalar("runtime_top_k") or None,  # 0 is off, for both
        "top_p": row.scalar("runtime_top_p") or None,
        "n": row.scalar("num_return_sequences"),
        "logprobs": row.scalar("return_log_probs"),
        "stop": texts(row.array("stop_words"), "stop_words") or None,
        "stop_token_sequences": _word_list(row.array("stop_words_list"), "stop_words_list") or None,
        "bad": texts(row.array("bad_words"), "bad_words") or None,
        "bad_token_sequences": _word_list(row.array("bad_words_list"), "bad_words_list") or None,
    }
    if guide := _guide(row):
        given["guided_decoding"] = guide
    same_name = ("temperature", "repetition_penalty", "presence_penalty", "frequency_penalty", "end_id")
    given |= {name: row.scalar(name) for name in (*same_name, "return_context_logits", "return_generation_logits")}
    params = SamplingParams(**{name: value for name, value in given.items() if value is not None})
    # As TensorRT-LLM's executor has it: who gives neither top_k nor top_p gets the likeliest token, at any temperature.
    return params if params.top_k or params.top_p else replace(params, temperature=None)


def _guide(row: _Row) -> GuidedDecodingParams | None:
    """What the text must be, in the words of TensorRT-LLM's executor."""
    names = ("guided_decoding_guide_type", "guided_decoding_guide")
    kind, guide = (next(iter(texts(row.array(name), name)), None) for name in names)
    if kind is None and guide is None:
        return None
    if kind == "json" and guide is None:
        return GuidedDecodingParams(json_object=True)
    if kind == "json_schema" and guide is not None:
        return GuidedDecodingParams(json=guide)
    if kind == "regex" and guide is not None:
        return GuidedDecodingParams(regex=guide)
    given = "given" if guide is not None else "not"
    raise RequestError(
        f"guided_decoding_guide_type is {kind!r} and guided_decoding_guide is {given}: give json alone, or json_schema "
        "or regex with one"
    )


def _word_list(array: np.ndarray | None, name: str) -> list[list[int]]:
    """Runs of ids of a word list, int32 ``[2, n]``: the ids one after the other, and below where each run ends."""
    if array is None:
        return []
    ids, ends = array.tolist()
    ends = [e for e in ends if e >= 0]
    if sorted(ends) != ends or any(e > len(ids) for e in ends):
        raise RequestError(f"{name} ends its words at {ends}: the ends must ascend up to the {len(ids)} ids there are")
    return [run for run in _runs(ids, ends) if run]


def _runs(ids: list[int], ends: list[int]) -> Iterator[list[int]]:
    start = 0
    for end in ends:
        yield ids[start:end]
        start = end
