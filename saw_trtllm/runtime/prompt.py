"""Prompts in all their forms, and their text to token ids: its length is checked before the work that it would cost."""

from __future__ import annotations

import operator
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple, cast

from saw_trtllm.errors import ContextLengthError, RequestError
from saw_trtllm.runtime.keywords import is_text, shown
from saw_trtllm.runtime.tokenizer import Tokenizer

#: Text, token ids, or a dict of TensorRT-LLM's and vLLM's form.
Prompt = str | Sequence[int] | Mapping[str, Any]

#: Characters of a cache salt at most.
MAX_SALT = 256

_FORMS = 'text, a list of token ids, {"prompt": text} or {"prompt_token_ids": ids}'


def split_prompts(inputs: Prompt | Iterable[Prompt]) -> tuple[list[Prompt], bool]:
    """The prompts, and whether it is one, not in a list.

    Raises
    ------
    RequestError
        If it is neither a prompt nor a list of them.
    """
    if isinstance(inputs, str | Mapping):
        return [inputs], True
    try:
        if isinstance(inputs, bytes | bytearray):
            raise TypeError
        prompts = list(inputs)
    except TypeError:
        raise RequestError(f"inputs is {shown(inputs)}: give {_FORMS}, or a list of these") from None
    if prompts and _is_whole_number(prompts[0]):
        return [cast("list[int]", prompts)], True
    return cast("list[Prompt]", prompts), False


def _is_whole_number(value: object) -> bool:
    """Whether it is one, be it Python's, NumPy's or PyTorch's: an item of their arrays of one dimension."""
    return hasattr(value, "__index__") and getattr(value, "ndim", 0) == 0


class PromptParts(NamedTuple):
    """A prompt's text and its token ids, the one that was not given being None, and its cache salt.

    Only requests of the same salt find each other's blocks, so that who does not know it cannot learn from the time to
    the first token what others have asked.
    """

    text: str | None
    token_ids: list[int] | None
    cache_salt: str = ""


def read_prompt(prompt: Prompt) -> PromptParts:
    """What a prompt of any form holds.

    Raises
    ------
    RequestError
        If it has none of the forms.
    """
    if isinstance(prompt, str):
        return PromptParts(prompt, None)
    if not isinstance(prompt, Mapping):
        return PromptParts(None, _token_ids(prompt))
    given = {name: value for name, value in prompt.items() if value is not None}
    salt = given.pop("cache_salt", "")
    if not (isinstance(salt, str) and len(salt) <= MAX_SALT and is_text(salt)):
        raise RequestError(f"cache_salt is {shown(salt)}: give text of at most {MAX_SALT} whole characters")
    unknown = given.keys() - {"prompt", "prompt_token_ids"}
    if unknown or not given:
        what = f"has {shown(next(iter(unknown)))}" if unknown else "is empty"
        raise RequestError(f"the prompt's dict {what}: give {_FORMS}")
    text, ids = given.get("prompt"), given.get("prompt_token_ids")
    if not isinstance(text, str | None):
        raise RequestError(f"the prompt is {shown(text)}: give text, or token ids as prompt_token_ids")
    return PromptParts(text, None if ids is None else _token_ids(ids), salt)


def _token_ids(prompt: Iterable[int]) -> list[int]:
    try:
        if isinstance(prompt, bytes | bytearray):
            raise TypeError
        return [operator.index(i) for i in prompt]
    except TypeError:
        raise RequestError(f"the prompt is {shown(prompt)}: give {_FORMS}") from None


def encode_prompt(
    tokenizer: Tokenizer, text: str, max_input_len: int | None = None, add_special_tokens: bool = True
) -> list[int]:
    """Token ids of a prompt.

    A token stands for at most :attr:`Tokenizer.longest_token` bytes, so a text of more than ``max_input_len`` times as
    many is too long as a rule. It is tokenized no further than it takes to be sure: all of it would take minutes for
    some megabytes.

    Parameters
    ----------
    tokenizer : Tokenizer
    text : str
    max_input_len : int, optional
        Tokens of the longest prompt; None is any number.
    add_special_tokens : bool
        Whether the tokenizer adds its own.

    Raises
    ------
    RequestError
        If the text is empty, cannot be written as UTF-8, or is too long.
    """
    try:
        size = len(text.encode("utf-8"))
    except UnicodeEncodeError:
        raise RequestError("the prompt is not valid UTF-8: give text without broken bytes or lone surrogates") from None
    if (
        max_input_len is not None
        and size > max_input_len * tokenizer.longest_token
        and _is_too_long(tokenizer, text, max_input_len)
    ):
        raise ContextLengthError(
            f"the prompt has {size} bytes, too many for the {max_input_len} tokens that the engine takes: {_REMEDY}"
        )
    ids = tokenizer.encode(text, add_special_tokens) if text else []
    if not ids:
        raise RequestError("the prompt is empty: give at least one character")
    if max_input_len is not None:
        check_input_len(len(ids), max_input_len)
    return ids


def _is_too_long(tokenizer: Tokenizer, text: str, max_input_len: int) -> bool:
    """Whether a text has far more tokens than ``max_input_len``, by its first characters that do.

    Bytes alone do not say so: normalizers shorten texts, some added tokens take the spaces beside them, and models drop
    or join what they do not know. A cut changes the last tokens before it alone.
    """
    end = max_input_len * tokenizer.longest_token
    while end < len(text):
        if len(tokenizer.encode(text[:end], False)) > 2 * max_input_len:
            return True
        end *= 2
    return False


def check_input_len(count: int, max_input_len: int) -> None:
    """Reject a prompt of more than ``max_input_len`` tokens.

    Raises
    ------
    RequestError
    """
    if count > max_input_len:
        raise ContextLengthError(f"the prompt has {count} tokens and the engine takes {max_input_len}: {_REMEDY}")


_REMEDY = "shorten it, or build the engine with a larger --max_input_len"
