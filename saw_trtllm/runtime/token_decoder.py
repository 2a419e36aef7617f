"""What each token adds to a text, by the rules of the ``tokenizers`` library's decoders.

The library decodes whole sequences. Decoding parts and comparing does not do for a text that grows: a decoder may strip
the first space that it sees, or take back whole characters when a stray byte follows them. The decoders of Llama,
Mistral and Qwen are simple enough to say what each token adds, and when that is final.
"""

from __future__ import annotations

import codecs
import json
import re
from typing import NamedTuple

import tokenizers

from saw_trtllm.errors import CheckpointError

#: What a decoder writes for bytes that are not UTF-8.
REPLACEMENT = "\N{REPLACEMENT CHARACTER}"

#: Steps of the decoders that are known, each name with a space.
_DECODERS = re.compile(r"(ByteLevel |Metaspace )?(Fuse )?|(Replace )*(ByteFallback )?(Fuse (Strip )?)?")
_BYTE_TOKEN = re.compile(r"<0x([0-9A-Fa-f]{2})>")
#: A token that stands before another one, to see what that one adds.
_ANCHOR = "a"


def _byte_level_alphabet() -> dict[str, int]:
    """The byte of each character of a byte-level token: GPT-2's ``bytes_to_unicode``, read from its other side."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {chr(256 + i): byte for i, byte in enumerate(others)}


_BYTE_LEVEL = _byte_level_alphabet()


class TokenPiece(NamedTuple):
    """A token's part in a text.

    Attributes
    ----------
    data : bytes
        What it adds after another token: UTF-8, or part of a character.
    alone : bytes
        What it adds as a text's first token.
    special : bool
        Whether it is not shown.
    is_byte : bool
        Whether it is one of the bytes that stand for characters which the vocabulary lacks.
    """

    data: bytes
    alone: bytes
    special: bool = False
    is_byte: bool = False


class TokenDecoder:
    """A tokenizer's decoder, token by token.

    Parameters
    ----------
    tokenizer : tokenizers.Tokenizer

    Attributes
    ----------
    strip : tuple of (str, int)
        A character, and how many of it the decoder strips from the beginning of a text at most.

    Raises
    ------
    CheckpointError
        If the decoder is none that is known.
    """

    def __init__(self, tokenizer: tokenizers.Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._decoder = tokenizer.decoder
        steps = _steps(json.loads(self._decoder.__getstate__())) if self._decoder else []
        names = [step["type"] for step in steps]
        if not _DECODERS.fullmatch("".join(f"{name} " for name in names)) or any(s.get("stop") for s in steps):
            raise CheckpointError(
                f"the tokenizer's decoder is {', '.join(names)}, which is not supported: Llama, Mistral and Qwen have "
                "ByteLevel, Metaspace, or Replace, ByteFallback, Fuse and a Strip of the beginning"
            )
        self._byte_level, self._byte_fallback = "ByteLevel" in names, "ByteFallback" in names
        self.strip = next(((s["content"], s["start"]) for s in steps if s["type"] == "Strip"), ("", 0))
        self._special = {t.content for t in tokenizer.get_added_tokens_decoder().values() if t.special}
        self._pieces: dict[int, TokenPiece] = {}

    def piece(self, token: int) -> TokenPiece:
        """A token's part; one that the tokenizer does not know has none."""
        piece = self._pieces.get(token)
        if piece is None:
            piece = self._pieces[token] = self._piece(self._tokenizer.id_to_token(token))
        return piece

    def _piece(self, token: str | None) -> TokenPiece:
        if token is None:
            return TokenPiece(b"", b"", special=True)
        special = token in self._special
        if self._byte_fallback and (byte := _BYTE_TOKEN.fullmatch(token)):
            data = bytes.fromhex(byte[1])
            return TokenPiece(data, data, special, is_byte=True)
        if self._byte_level:
            known = all(char in _BYTE_LEVEL for char in token)
            data = bytes(_BYTE_LEVEL[char] for char in token) if known else token.encode()
            return TokenPiece(data, data, special)
        if self._decoder is None:  # the library joins the tokens with spaces
            return TokenPiece(f" {token}".encode(), token.encode(), special)
        data = self._decoder.decode([_ANCHOR, token])[len(self._decoder.decode([_ANCHOR])) :].encode()
        # Stripping is done on the text, since it may go on beyond the first token.
        return TokenPiece(data, data if self.strip[1] else self._decoder.decode([token]).encode(), special)


def _steps(decoder: dict) -> list[dict]:
    if decoder["type"] != "Sequence":
        return [decoder]
    return [step for part in decoder["decoders"] for step in _steps(part)]


class TextBuilder:
    """The text of tokens that come one by one; what it gives is final.

    Joined, and with :meth:`finish`, it is the library's decoding of all of them without special tokens.

    Parameters
    ----------
    decoder : TokenDecoder

    Attributes
    ----------
    leading : str
        What was stripped from the beginning, as the tokens are a text's first. Once there is text it stays as it is.
    """

    def __init__(self, decoder: TokenDecoder) -> None:
        self.leading = ""
        self._is_first = True
        self._strip: str
        self._to_strip: int
        self._strip, self._to_strip = decoder.strip
        self._utf8 = codecs.getincrementaldecoder("utf-8")("replace")
        self._run = bytearray()  # byte tokens in a row are characters all together, or none of them is

    @property
    def pending(self) -> bool:
        """Whether the last tokens' text is not final yet."""
        return bool(self._run or self._utf8.getstate()[0])

    def push(self, piece: TokenPiece, size: int | None = None) -> str:
        """Take a token, or the first ``size`` bytes of it, and give what is final now."""
        if piece.special:
            return ""
        data = piece.data[:size]
        if self._is_first:
            self._is_first = False
            lead = len(piece.data) - len(piece.alone) if piece.data.endswith(piece.alone) else 0
            self.leading = data[:lead].decode()
            data = piece.alone[: max(0, len(data) - lead)]
        if piece.is_byte:
            self._run += data
            return ""
        return self._stripped(self._end_run() + self._utf8.decode(data))

    def finish(self) -> str:
        """The rest of the text."""
        return self._stripped(self._end_run() + self._utf8.decode(b"", final=True))

    def _end_run(self) -> str:
        run, self._run = self._run, bytearray()
        try:
            return run.decode()
        except UnicodeDecodeError:
            return REPLACEMENT * len(run)

    def _stripped(self, text: str) -> str:
        while self._to_strip and text:
            if text[0] != self._strip:
                self._to_strip = 0
                break
            self.leading += text[0]
            text = text[1:]
            self._to_strip -= 1
        return text
