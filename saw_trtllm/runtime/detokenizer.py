"""Text of a growing sequence, piece by piece, with stop strings."""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from typing import NamedTuple

from saw_trtllm.runtime.stop_matcher import Match, StopMatcher
from saw_trtllm.runtime.token_decoder import TextBuilder, TokenPiece
from saw_trtllm.runtime.tokenizer import Tokenizer


class Piece(NamedTuple):
    """Tokens that are ready to be shown.

    Attributes
    ----------
    token_ids : list of int
    text : str
    leading : str
        What was stripped from the beginning of the whole text, and would not be if another text stood before it.
    """

    token_ids: list[int]
    text: str
    leading: str


class _Held(NamedTuple):
    token: int
    piece: TokenPiece
    end: int  # in the bytes of all tokens


class Detokenizer:
    """Turns a sequence's tokens to text and looks for stop strings.

    The pieces' texts, joined, are the tokenizer's decoding of all tokens. A token is held back while its text is not
    final, or may be part of a stop string; held tokens come out with the first that settles it.

    Stop strings are looked for as transformers' ``StopStringCriteria`` does: in the bytes that the tokens stand for,
    the special ones among them. The text before a stop string is the decoding of the bytes before it.

    Parameters
    ----------
    tokenizer : Tokenizer, optional
        None gives empty texts and never holds a token.
    stop : sequence of str
        Strings to stop at.
    include_stop : bool
        Whether the text keeps the stop string, without its special tokens.
    """

    def __init__(self, tokenizer: Tokenizer | None, stop: Sequence[str] = (), include_stop: bool = False) -> None:
        self._has_text = tokenizer is not None
        if tokenizer is not None:
            self._decoder = tokenizer.decoder
            self._builder = TextBuilder(self._decoder)
        self._stop = tuple(stop)
        self._include_stop = include_stop
        self._matcher = StopMatcher([s.encode() for s in self._stop]) if self._stop else None
        self._held: deque[_Held] = deque()
        self._length = 0  # bytes of all tokens
        self._ready: list[int] = []

    def push(self, token: int, may_stop: bool = True, last: bool = False) -> tuple[Piece | None, str | int | None]:
        """Take a token.

        Parameters
        ----------
        token : int
        may_stop : bool
            False before ``min_tokens``.
        last : bool
            Whether the text ends with it.

        Returns
        -------
        tuple of (Piece or None, str or None)
            What can be shown now, and the stop string that ended the text.
        """
        if not self._has_text:
            return Piece([token], "", ""), None
        match = self._take(token)
        if match and may_stop:
            return self._cut(match), self._stop[match.run]
        if last:
            return self.flush(), None
        text = self._release(self._matcher.settled if self._matcher else self._length)
        if self._ready and (text or not self._builder.pending):
            return self._send(text), None
        return None, None

    def end(self, token: int) -> tuple[Piece, str | int | None]:
        """Take the end token. It is no part of the text, but a stop string may end in it."""
        match = self._take(token) if self._matcher else None
        if match:
            return self._cut(match), self._stop[match.run]
        if self._matcher:
            self._held.pop()
        return self.flush(), None

    def flush(self) -> Piece:
        """What was held, as it is, at the end of the text."""
        if not self._has_text:
            return Piece([], "", "")
        return self._send(self._release(self._length) + self._builder.finish())

    def _take(self, token: int) -> Match | None:
        piece = self._decoder.piece(token)
        self._length += len(piece.data)
        self._held.append(_Held(token, piece, self._length))
        return self._matcher.push(piece.data) if self._matcher else None

    def _release(self, settled: int) -> str:
        """Text of the held tokens that end within the first bytes."""
        texts = []
        while self._held and self._held[0].end <= settled:
            token, piece, _ = self._held.popleft()
            texts.append(self._builder.push(piece))
            self._ready.append(token)
        return "".join(texts)

    def _cut(self, match: Match) -> Piece:
        """All held tokens, with their text up to a stop string."""
        limit = match.end if self._include_stop else match.start
        text = self._release(limit)
        for token, piece, end in self._held:
            begin = end - len(piece.data)
            if begin < limit:
                text += self._builder.push(piece, limit - begin)
            self._ready.append(token)
        self._held.clear()
        return self._send(text + self._builder.finish())

    def _send(self, text: str) -> Piece:
        ready, self._ready = self._ready, []
        return Piece(ready, text, self._builder.leading)
