"""A prompt's text to token ids, with its length checked before the work that it would cost."""

from __future__ import annotations

from saw_trtllm.errors import RequestError
from saw_trtllm.runtime.tokenizer import Tokenizer


def encode_prompt(
    tokenizer: Tokenizer, text: str, max_input_len: int | None = None, add_special_tokens: bool = True
) -> list[int]:
    """Token ids of a prompt.

    A token stands for at most :attr:`Tokenizer.longest_token` bytes, so a text of more than ``max_input_len`` times as
    many is too long whatever its tokens are, and is not tokenized: that would take minutes for some megabytes.

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
    if max_input_len is not None and size > max_input_len * tokenizer.longest_token:
        raise RequestError(
            f"the prompt has {size} bytes, too many for the {max_input_len} tokens that the engine takes: {_REMEDY}"
        )
    ids = tokenizer.encode(text, add_special_tokens) if text else []
    if not ids:
        raise RequestError("the prompt is empty: give at least one character")
    if max_input_len is not None:
        check_input_len(len(ids), max_input_len)
    return ids


def check_input_len(count: int, max_input_len: int) -> None:
    """Reject a prompt of more than ``max_input_len`` tokens.

    Raises
    ------
    RequestError
    """
    if count > max_input_len:
        raise RequestError(f"the prompt has {count} tokens and the engine takes {max_input_len}: {_REMEDY}")


_REMEDY = "shorten it, or build the engine with a larger --max_input_len"
