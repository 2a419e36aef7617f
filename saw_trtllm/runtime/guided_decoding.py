"""Texts that follow a schema, a regular expression or a grammar: of each next token, whether it may come.

The masks are llguidance's. Of the two libraries that engines use it needs no PyTorch, compiles most schemas in under a
millisecond, and computes a mask in some microseconds, as a rule; xgrammar imports PyTorch and transformers.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, fields, replace
from typing import Any, Literal

import numpy as np
from pydantic import BaseModel

from saw_trtllm.errors import RequestError
from saw_trtllm.runtime.keywords import check_keywords, shown
from saw_trtllm.runtime.tokenizer import Tokenizer

_KINDS = ("json", "json_object", "regex", "grammar")
#: White space between the parts of JSON. Without a limit a small model may write it to the end.
_WHITE_SPACE = r"[ \n]{0,20}"
_BEGIN, _END = "<think>", "</think>"
#: Threads for masks: more find nothing to do.
_MAX_THREADS = 8
#: Bytes of a schema or grammar.
_MAX_SIZE = 1 << 18


@dataclass(frozen=True)
class GuidedDecodingParams:
    """What a text must be: one of these.

    Parameters
    ----------
    json : str, dict or type, optional
        A JSON schema, or a pydantic model.
    json_object : bool
        Any JSON object.
    regex : str, optional
        A regular expression that the whole text matches.
    grammar : str, optional
        A grammar in Lark's form.
    reasoning : {"may come", "begun"}, optional
        Whether the model may think between ``<think>`` and ``</think>`` before, or does so already in the prompt.

    Raises
    ------
    RequestError
        If it is not one of them.
    """

    json: str | Mapping[str, Any] | type[BaseModel] | bool | None = None
    regex: str | None = None
    grammar: str | None = None
    json_object: bool = False
    reasoning: Literal["may come", "begun"] | None = None

    def __new__(cls, *_: Any, **named: Any) -> GuidedDecodingParams:
        """Reject the names of arguments that it does not have."""
        check_keywords(cls.__name__, named, [f.name for f in fields(cls)], RequestError)
        return super().__new__(cls)

    def __post_init__(self) -> None:
        given = [name for name in _KINDS if getattr(self, name) not in (None, False) or self._is_schema(name)]
        if len(given) != 1:
            raise RequestError(
                f"guided_decoding has {' and '.join(given) or 'nothing'}: give one of {', '.join(_KINDS)}"
            )
        for name in ("regex", "grammar"):
            value = getattr(self, name)
            if not isinstance(value, str | None) or len(value or "") > _MAX_SIZE:
                raise RequestError(f"{name} is {shown(value)}: it must be text of at most {_MAX_SIZE} characters")

        if not isinstance(self.json_object, bool):
            raise RequestError(f"json_object is {shown(self.json_object)}: it must be True or False")

    def _is_schema(self, name: str) -> bool:
        return name == "json" and self.json is False  # a schema too, if one that nothing meets

    def with_reasoning(self, reasoning: Literal["may come", "begun"] | None) -> GuidedDecodingParams:
        """The same, after the model has thought."""
        return replace(self, reasoning=reasoning)

    @property
    def schema(self) -> str | None:
        """The JSON schema as text."""
        if self.json_object:
            return '{"type": "object"}'
        value = self.json
        if isinstance(value, type) and issubclass(value, BaseModel):
            value = value.model_json_schema()
        if isinstance(value, bool):
            if not value:
                raise RequestError("guided_decoding cannot be followed: its JSON schema is false, which nothing meets")
            value = {}
        if value is None or isinstance(value, str):
            return value
        try:
            return json.dumps(dict(value) if isinstance(value, Mapping) else value)
        except (TypeError, ValueError, RecursionError):
            raise RequestError(f"json is {shown(self.json)}: it must be a JSON schema") from None


class Guide:
    """The state of one text.

    Parameters
    ----------
    matcher : llguidance.LLMatcher
    vocab_size : int
        Tokens of the model.
    begin, end : int or None
        The tokens around the reasoning that may come first; without ``end`` there is none.

    Raises
    ------
    RequestError
        If the grammar is too complex.
    """

    def __init__(self, matcher: Any, vocab_size: int, begin: int | None = None, end: int | None = None) -> None:
        self._matcher = matcher
        self._vocab_size = vocab_size
        self._begin, self._end = begin, end
        self._thinks = end is not None and begin is None
        self._mask = self._next_mask()
        self._is_known = True
        if self._mask is not None and begin is not None:
            self._mask[begin // 32] |= np.uint32(1 << begin % 32)

    @property
    def mask(self) -> np.ndarray | None:
        """Which tokens may come next, as :class:`saw_trtllm.runtime.sampling.SamplingState` has it; None for any.

        Raises
        ------
        RequestError
            If the grammar has become too complex. It is worked out when it is first asked for after a token.
        """
        if not self._is_known:
            self._mask = self._next_mask()
            self._is_known = True
        return self._mask

    @property
    def stopped(self) -> bool:
        """Whether the text is whole: nothing more may come."""
        return not self._thinks and self._matcher.is_stopped()

    def accept(self, token: int) -> None:
        """Take the token that came.

        Raises
        ------
        RequestError
            If the grammar has become too complex.
        """
        begin, self._begin = self._begin, None
        if self._thinks:
            self._thinks = token != self._end
        elif token == begin:
            self._thinks = True
        else:
            self._matcher.consume_token(token)
            self._check()
        self._is_known = False

    def _next_mask(self) -> np.ndarray | None:
        if self._thinks:
            return None
        mask = np.frombuffer(bytearray(self._matcher.compute_bitmask()), np.uint32)
        self._check()
        return mask[: -(-self._vocab_size // 32)]

    def _check(self) -> None:
        if self._matcher.is_error():
            raise RequestError(f"the grammar cannot be followed further: {_sentence(self._matcher.get_error())}")


class MaskThreads:
    """Threads in which the masks of several texts are worked out at once: the library does it without Python's lock."""

    def __init__(self) -> None:
        self._size = min(_MAX_THREADS, os.cpu_count() or 1)
        self._threads = ThreadPoolExecutor(self._size, "saw-masks")  # which start when they are needed

    def work_out(self, guides: Sequence[Guide]) -> list[Exception | None]:
        """Have the mask of each guide known; what it failed with, where it did."""
        if len(guides) == 1:
            return [_failure(guides[0])]
        failures: list[Exception | None] = [None] * len(guides)

        def work(first: int) -> None:
            for i in range(first, len(guides), self._size):
                failures[i] = _failure(guides[i])

        list(self._threads.map(work, range(min(self._size, len(guides)))))
        return failures

    def close(self) -> None:
        """Let the threads end."""
        self._threads.shutdown()


def _failure(guide: Guide) -> Exception | None:
    try:
        _ = guide.mask
    except Exception as e:  # the library's own too: it is its text's matter
        return e
    return None


class Guides:
    """Makes the guides of a model's texts.

    Parameters
    ----------
    tokenizer : Tokenizer
    vocab_size : int
        Tokens of the model.
    end_ids : tuple of int
        Tokens that end a text.

    Raises
    ------
    RequestError
        If llguidance is not installed, or no token ends a text.
    """

    def __init__(self, tokenizer: Tokenizer, vocab_size: int, end_ids: tuple[int, ...]) -> None:
        try:
            import llguidance
        except ImportError:
            raise RequestError(
                "guided decoding needs llguidance, which is not installed: pip install 'saw-trtllm[serve]'"
            ) from None
        if not end_ids:
            raise RequestError("guided decoding needs a token that ends a text, and this model names none")
        self._library = llguidance
        self._vocab_size = vocab_size
        size = max(vocab_size, tokenizer.vocab_size)
        self._tokens = llguidance.LLTokenizer(tokenizer.to_json(), n_vocab=size, eos_token=list(end_ids))
        self._think = (tokenizer.token_id(_BEGIN), tokenizer.token_id(_END))

    def make(self, params: GuidedDecodingParams) -> Guide:
        """A guide for one text.

        Raises
        ------
        RequestError
            If the schema or grammar is malformed, or nothing meets it.
        """
        grammar = self._grammar(params)
        if error := self._library.LLMatcher.validate_grammar(grammar, self._tokens):
            raise RequestError(f"guided_decoding cannot be followed: {_sentence(error)}")
        matcher = self._library.LLMatcher(self._tokens, grammar, log_level=0)
        begin, end = self._think
        if params.reasoning is None or begin is None or end is None:
            return Guide(matcher, self._vocab_size)
        return Guide(matcher, self._vocab_size, begin if params.reasoning == "may come" else None, end)

    def _grammar(self, params: GuidedDecodingParams) -> str:
        matcher = self._library.LLMatcher
        try:
            if params.regex is not None:
                return matcher.grammar_from_regex(params.regex)
            if params.grammar is not None:
                return matcher.grammar_from_lark(params.grammar)
            schema = params.schema or ""
            if len(schema) > _MAX_SIZE:
                raise RequestError(f"the schema has {len(schema)} characters: give at most {_MAX_SIZE}")
            return matcher.grammar_from_json_schema(schema, overrides={"whitespace_pattern": _WHITE_SPACE})
        except ValueError as e:
            if isinstance(e, RequestError):
                raise
            raise RequestError(f"guided_decoding cannot be read: {_sentence(str(e))}") from e


def _sentence(error: str) -> str:
    return " ".join(error.partition("<state>")[0].split())[:300]
