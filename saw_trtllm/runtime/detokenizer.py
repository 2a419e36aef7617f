"""Text of a growing sequence, piece by piece, with stop strings."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from saw_trtllm.runtime.tokenizer import Tokenizer

#: What a decoder writes for bytes that are not, or not yet, UTF-8.
REPLACEMENT = "\N{REPLACEMENT CHARACTER}"


def decode_piece(tokenizer: Tokenizer, context_ids: Sequence[int], new_ids: Sequence[int]) -> str:
    """Text that ``new_ids`` add behind ``context_ids``.

    Decoders strip or insert spaces by what stands before, so a piece is the difference of two decodings.
    """
    return tokenizer.decode([*context_ids, *new_ids])[len(tokenizer.decode(context_ids)) :]


class Piece(NamedTuple):
    """Tokens that are ready to be shown.

    Attributes
    ----------
    context_ids, token_ids : list of int
        ``text == decode_piece(tokenizer, context_ids, token_ids)[:len(text)]``.
    text : str
    """

    context_ids: list[int]
    token_ids: list[int]
    text: str


class Detokenizer:
    """Turns a sequence's tokens to text and looks for stop strings.

    A token is held back while its bytes are no whole character yet, or while its text may be the beginning of a stop
    string; held tokens come out with the first that settles it.

    Parameters
    ----------
    tokenizer : Tokenizer, optional
        None gives empty texts and never holds a token.
    stop : sequence of str
        Strings to stop at.
    include_stop : bool
        Whether the text keeps the stop string.
    """

    #: Tokens that a piece is decoded behind, at least: enough for any decoder's rules on spaces.
    _CONTEXT = 6

    def __init__(self, tokenizer: Tokenizer | None, stop: Sequence[str] = (), include_stop: bool = False) -> None:
        self._tokenizer = tokenizer
        self._stop = tuple(stop)
        self._include_stop = include_stop
        # The last pieces. Whole ones, since a context that began within a character would spoil what follows.
        self._sent: list[list[int]] = []
        self._context: list[int] = []  # their tokens
        self._context_chars = 0
        self._chars = 0  # with the held tokens
        self._held: list[int] = []

    def push(self, token: int, may_stop: bool = True) -> tuple[Piece | None, str | None]:
        """Take a token.

        Parameters
        ----------
        token : int
        may_stop : bool
            False before ``min_tokens``.

        Returns
        -------
        tuple of (Piece or None, str or None)
            What can be shown now, and the stop string that ended the text.
        """
        self._held.append(token)
        if self._tokenizer is None:
            return self.flush(), None
        text = self._held_text()
        if may_stop:
            found = [(text.find(s), s) for s in self._stop if s in text]
            if found:
                at, stop = min(found)
                return self._send(text[: at + len(stop) * self._include_stop]), stop
        if text.endswith(REPLACEMENT) or (may_stop and any(_may_begin(text, s) for s in self._stop)):
            return None, None
        return self._send(text), None

    def flush(self) -> Piece | None:
        """What was held, as it is, at the end of the text."""
        if not self._held:
            return None
        return self._send(self._held_text() if self._tokenizer else "")

    def _held_text(self) -> str:
        text = self._tokenizer.decode([*self._context, *self._held])
        self._chars = len(text)
        return text[self._context_chars :]

    def _send(self, text: str) -> Piece:
        piece = Piece(self._context, self._held, text)
        self._sent.append(self._held)
        self._context = [*self._context, *self._held]
        self._context_chars, self._held = self._chars, []
        if len(self._context) >= 2 * self._CONTEXT:  # seldom, since what is left must be decoded anew
            while len(self._context) - len(self._sent[0]) >= self._CONTEXT:
                self._context = self._context[len(self._sent.pop(0)) :]
            self._context_chars = len(self._tokenizer.decode(self._context)) if self._tokenizer else 0
        return piece


def _may_begin(text: str, stop: str) -> bool:
    """Whether the text ends in a beginning of ``stop``."""
    return any(text.endswith(stop[:n]) for n in range(1, len(stop)))
