"""A Hugging Face folder's tokenizer, through the ``tokenizers`` library alone."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property
from pathlib import Path

import tokenizers

from saw_trtllm.config import read_json
from saw_trtllm.errors import CheckpointError
from saw_trtllm.paths import is_file, is_folder, reject_lfs_pointer


class Tokenizer:
    """``tokenizer.json`` with the special tokens that the files beside it name.

    Attributes
    ----------
    eos_ids : tuple of int
        Tokens that end a text: those of generation_config.json, else of tokenizer_config.json.
    bos_id : int or None
    """

    def __init__(self, tokenizer: tokenizers.Tokenizer, eos_ids: Sequence[int] = (), bos_id: int | None = None) -> None:
        self._tokenizer = tokenizer
        self.eos_ids = tuple(eos_ids)
        self.bos_id = bos_id

    @classmethod
    def load(cls, path: Path | str) -> Tokenizer:
        """Load from a folder, or from a ``tokenizer.json``.

        Raises
        ------
        CheckpointError
            If there is no tokenizer.json, or it cannot be read.
        """
        path = Path(path)
        file = path / "tokenizer.json" if is_folder(path, CheckpointError) else path
        if not is_file(file, CheckpointError):
            raise CheckpointError(f"{file} does not exist: a tokenizer in Hugging Face's tokenizer.json form is needed")
        try:
            tokenizer = tokenizers.Tokenizer.from_file(str(file))
        except Exception as e:  # the library raises bare Exception
            reject_lfs_pointer(file, CheckpointError)
            raise CheckpointError(f"{file} cannot be read as a tokenizer: {e}") from e
        tokenizer.no_truncation()
        tokenizer.no_padding()
        settings = _optional(file.with_name("tokenizer_config.json"))
        eos = _optional(file.with_name("generation_config.json")).get("eos_token_id")
        if eos is None:
            eos = _token_id(tokenizer, settings.get("eos_token"))
        eos_ids = [] if eos is None else eos if isinstance(eos, list) else [eos]
        return cls(tokenizer, eos_ids, _token_id(tokenizer, settings.get("bos_token")))

    @property
    def vocab_size(self) -> int:
        """Tokens that the tokenizer knows, the added ones among them."""
        return self._tokenizer.get_vocab_size(with_added_tokens=True)

    @cached_property
    def longest_token(self) -> int:
        """Bytes that a token can stand for at most: the vocabulary writes none shorter than it is in a text."""
        return max(len(token.encode("utf-8")) for token in self._tokenizer.get_vocab(with_added_tokens=True))

    def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
        """Text to token ids, with the special tokens that the tokenizer's own template adds."""
        return self._tokenizer.encode(text, add_special_tokens=add_special_tokens).ids

    def decode(self, ids: Sequence[int], skip_special_tokens: bool = True) -> str:
        """Token ids to text."""
        return self._tokenizer.decode(list(ids), skip_special_tokens=skip_special_tokens)


def _optional(path: Path) -> dict:
    return read_json(path, CheckpointError) if is_file(path, CheckpointError) else {}


def _token_id(tokenizer: tokenizers.Tokenizer, token: str | dict | None) -> int | None:
    if isinstance(token, dict):  # a serialized AddedToken
        token = token.get("content")
    return tokenizer.token_to_id(token) if token else None
