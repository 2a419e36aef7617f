"""A Hugging Face folder's tokenizer, through nothing but the ``tokenizers`` library."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property
from pathlib import Path

import tokenizers

from saw_trtllm.errors import CheckpointError
from saw_trtllm.model.end_ids import read_end_ids
from saw_trtllm.paths import is_file, is_folder, read_json, reject_lfs_pointer
from saw_trtllm.runtime.chat_template import ChatTemplate
from saw_trtllm.runtime.keywords import shown
from saw_trtllm.runtime.token_decoder import TokenDecoder

_NAMED_TOKENS = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")


class Tokenizer:
    """``tokenizer.json`` with the special tokens that the files beside it name.

    Attributes
    ----------
    eos_ids : tuple of int
        Tokens that end a text: those that the model's files beside it name, else tokenizer_config.json's.
    bos_id : int or None
    chat_template : ChatTemplate or None
        How the model was taught to see conversations.
    decoder : TokenDecoder
        What each token adds to a text.

    Raises
    ------
    CheckpointError
        If its decoder is none that is known.
    """

    def __init__(
        self,
        tokenizer: tokenizers.Tokenizer,
        eos_ids: Sequence[int] = (),
        bos_id: int | None = None,
        chat_template: ChatTemplate | None = None,
    ) -> None:
        self._tokenizer = tokenizer
        self.chat_template = chat_template
        self.eos_ids = tuple(eos_ids)
        self.bos_id = bos_id
        self.decoder = TokenDecoder(tokenizer)

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
        _add_named_tokens(tokenizer, settings)
        eos_ids = read_end_ids(file.parent)
        if eos_ids is None:
            eos = _token_id(tokenizer, settings.get("eos_token"))
            eos_ids = () if eos is None else (eos,)
        bos_id = _token_id(tokenizer, settings.get("bos_token"))
        return cls(tokenizer, eos_ids, bos_id, ChatTemplate.load(file.parent))

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

    def token_id(self, text: str) -> int | None:
        """The token that stands for a text; None if there is none."""
        return self._tokenizer.token_to_id(text)

    def to_json(self) -> str:
        """The tokenizer as a ``tokenizer.json``."""
        return self._tokenizer.to_str()

    def names_special(self, text: str) -> bool:
        """Whether a text holds a special token."""
        tokens = self._tokenizer.get_added_tokens_decoder().values()
        return any(token.special and token.content in text for token in tokens)

    def decode(self, ids: Sequence[int], skip_special_tokens: bool = True) -> str:
        """Token ids to text."""
        return self._tokenizer.decode(list(ids), skip_special_tokens=skip_special_tokens)


def _optional(path: Path) -> dict:
    return read_json(path, CheckpointError) if is_file(path, CheckpointError) else {}


def _token_id(tokenizer: tokenizers.Tokenizer, token: str | dict | None) -> int | None:
    content = _content(token)
    return tokenizer.token_to_id(content) if content else None


def _content(token: str | dict | None) -> str | None:
    """A token's text; as a dict it is a serialized AddedToken."""
    content = token.get("content") if isinstance(token, dict) else token
    if not isinstance(content, str | None):
        raise CheckpointError(
            f"tokenizer_config.json has the token {shown(content)}: give its text, or an object with text as content"
        )
    return content


def _add_named_tokens(tokenizer: tokenizers.Tokenizer, settings: dict) -> None:
    """Make those of the vocabulary's tokens special that tokenizer_config.json has roles for, as transformers does."""
    added = {token.content for token in tokenizer.get_added_tokens_decoder().values()}
    named = [_content(settings.get(name)) for name in _NAMED_TOKENS]
    tokenizer.add_special_tokens([t for t in named if t and t not in added and tokenizer.token_to_id(t) is not None])
