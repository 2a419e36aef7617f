"""What a request gives back, in the words of TensorRT-LLM's LLM API."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np

from saw_trtllm.runtime.parts import FinishReason

#: What a piece of a stream has of all tokens so far.
_OF_TOKENS = ("token_ids", "logprobs", "top_logprobs")


class _Streamed:
    """Holds what a piece of a stream puts ``text``, ``token_ids`` and their log-probabilities together from."""

    __slots__ = ("__weakref__", "_so_far")
    _so_far: tuple[list[str], int, Mapping[str, list[Any]], int]


@dataclass(frozen=True, slots=True)
class CompletionOutput(_Streamed):
    """The generated text, up to and with the newest piece.

    Attributes
    ----------
    index : int
        Which of the request's ``n`` texts it is.
    text, token_ids : str, list of int
        All so far. The text is the decoding of the tokens without special ones, up to a stop string.
    text_diff, token_ids_diff : str, list of int
        This piece. Without streaming it is the whole text.
    leading_space : str
        What the tokenizer's decoder strips from the beginning of a text: the prompt, this and the text are together
        what it makes of the tokens of both.
    finish_reason : {"stop", "length", "cancelled"} or None
        None while more is to come.
    stop_reason : str, int or None
        The stop string or token that ended the text; None for the end token.
    cumulative_logprob, logprobs : float, list of float
        With ``logprobs=True``: log-probabilities of ``token_ids``, and their sum.
    top_logprobs : list of list of (int, float) or None
        With ``top_logprobs``: of each of ``token_ids``, the likeliest tokens in its place and their log-probabilities.
    generation_logits : numpy.ndarray or None
        fp32 ``[len(token_ids_diff), vocab_size]``: those of this piece.
    logprobs_diff, top_logprobs_diff : list or None
        Of ``token_ids_diff``, as ``logprobs`` and ``top_logprobs`` are of ``token_ids``.
    """

    text: str
    token_ids: list[int]
    text_diff: str
    token_ids_diff: list[int]
    leading_space: str
    finish_reason: FinishReason | None = None
    stop_reason: str | int | None = None
    cumulative_logprob: float | None = None
    logprobs: list[float] | None = None
    top_logprobs: list[list[tuple[int, float]]] | None = None
    generation_logits: np.ndarray | None = None
    index: int = 0
    logprobs_diff: list[float] | None = None
    top_logprobs_diff: list[list[tuple[int, float]]] | None = None

    @classmethod
    def streamed(
        cls, texts: list[str], num_texts: int, of_tokens: Mapping[str, list[Any]], num_tokens: int, **others: Any
    ) -> CompletionOutput:
        """A piece of a stream: what it has of all tokens so far is put together when somebody asks for it.

        Few do at each piece, and it would be most of what a piece of a long text costs.

        Parameters
        ----------
        texts : list of str
            The pieces' texts, of which the first ``num_texts`` count; the list grows.
        of_tokens : dict
            ``token_ids``, and ``logprobs`` and ``top_logprobs`` where they were asked for: lists, of each of which the
            first ``num_tokens`` count, and which grow.
        **others
            The other fields.
        """
        piece = cls("", [], **others)
        for name in ("text", *of_tokens):
            object.__delattr__(piece, name)
        object.__setattr__(piece, "_so_far", (texts, num_texts, of_tokens, num_tokens))
        return piece

    if not TYPE_CHECKING:  # else every name would be an attribute

        def __getattr__(self, name: str) -> Any:
            if name not in ("text", *_OF_TOKENS):
                raise AttributeError(f"{type(self).__name__!r} object has no attribute {name!r}")
            texts, num_texts, of_tokens, num_tokens = self._so_far
            value = "".join(texts[:num_texts]) if name == "text" else of_tokens[name][:num_tokens]
            object.__setattr__(self, name, value)
            return value


@dataclass(frozen=True)
class RequestOutput:
    """A request's state at a piece of its output.

    Attributes
    ----------
    request_id : int
    prompt : str or None
        None when token ids were given.
    prompt_token_ids : list of int
    outputs : list of CompletionOutput
        In a piece the one that has grown, at the end all ``n``.
    finished : bool
    context_logits : numpy.ndarray or None
        fp32 ``[len(prompt_token_ids), vocab_size]``, with the last piece.
    num_reused_tokens : int
        Leading tokens of the prompt that were found in the cache.
    prompt_logprobs : list of (float or None), optional
        With ``prompt_logprobs=True``, with the last piece: the log-probability of each token of the prompt after those
        before it; None of the first.
    """

    request_id: int
    prompt: str | None
    prompt_token_ids: list[int]
    outputs: list[CompletionOutput] = field(default_factory=list)
    finished: bool = False
    context_logits: np.ndarray | None = None
    num_reused_tokens: int = 0
    prompt_logprobs: list[float | None] | None = None
