"""From a text to windows of tokens."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from saw_trtllm.backends.reference.window import History, WindowModel
from saw_trtllm.checkpoint import Checkpoint
from saw_trtllm.errors import ConfigError, RequestError
from saw_trtllm.runtime.chat_template import ChatTemplate
from saw_trtllm.runtime.tokenizer import Tokenizer

#: Tokens of a text that a model makes up.
GENERATED_LENGTH = 1024


def read_text(path: Path, flag: str = "--text") -> str:
    """A UTF-8 file's text; ``-`` is stdin. A file that cannot be read is one of ``flag``."""
    try:
        data = sys.stdin.buffer.read() if str(path) == "-" else path.read_bytes()
        return data.decode("utf-8")
    except OSError as e:
        raise ConfigError(f"{path} cannot be read ({e.strerror}): give a text file with {flag}") from e
    except UnicodeDecodeError as e:
        raise ConfigError(f"{path} is not valid UTF-8 at byte {e.start}: save it as UTF-8") from e


def read_chats(path: Path, tokenizer_dir: Path) -> list[str]:
    """Conversations of a file, a JSON list of messages or an object with ``messages`` a line, as the model reads them.

    Raises
    ------
    ConfigError
        If the tokenizer's folder has no chat template, or a line is no conversation.
    """
    template = ChatTemplate.load(tokenizer_dir)
    if template is None:
        raise ConfigError(f"{tokenizer_dir} has no chat template: give conversations as text, with --text")
    texts = []
    for number, line in enumerate(read_text(path, "--chat").splitlines(), 1):
        if not line.strip():
            continue
        try:
            chat = json.loads(line)
            messages: Any = chat.get("messages") if isinstance(chat, dict) else chat
            texts.append(template.render(messages, add_generation_prompt=False))
        except (ValueError, RecursionError, RequestError) as e:
            raise ConfigError(
                f"{path} has no conversation in line {number} ({e}): give a JSON list of messages with role and content"
            ) from e
    return texts


def load_tokenizer(checkpoint: Checkpoint, folder: Path | None = None) -> Tokenizer:
    """The checkpoint's tokenizer, or the one in ``folder``."""
    return Tokenizer.load(folder or checkpoint.folder)


def prefix_token(tokenizer: Tokenizer) -> int:
    """What a text without a context begins with: the BOS token, or an end token where there is none."""
    return tokenizer.bos_id if tokenizer.bos_id is not None else next(iter(tokenizer.eos_ids), 0)


def generated_windows(
    model: WindowModel,
    first: int,
    count: int,
    length: int,
    progress: Callable[[int], None] | None = None,
) -> torch.Tensor:
    """Texts of a model's own, drawn from all it predicts.

    Parameters
    ----------
    model : WindowModel
        Its RoPE table covers ``length`` positions.
    first : int
        Token that each begins with.
    count, length : int
        Of the texts, which are drawn side by side.
    progress : callable, optional
        Called with tokens that are done.

    Returns
    -------
    torch.Tensor
        int64 ``[count, length]``.
    """
    generator = torch.Generator().manual_seed(0)
    history = History(model.exact, model.config.num_hidden_layers)
    tokens = [torch.full((count, 1), first)]
    while len(tokens) < length:
        chances = model.logits(model.hidden(tokens[-1], history=history)[:, -1]).softmax(-1).cpu()
        tokens.append(torch.multinomial(chances, 1, generator=generator))
        if progress is not None:
            progress(count)
    return torch.cat(tokens, dim=1)


def make_windows(
    ids: list[int],
    max_position_embeddings: int,
    max_seq_len: int | None = None,
    max_tokens: int | None = None,
    bos_id: int | None = None,
) -> torch.Tensor:
    """Cut a text into windows; what is left at its end is not used.

    A model whose tokenizer puts a BOS token before a text has seen none without it, so each window begins with it then.

    Parameters
    ----------
    ids : list of int
        The text.
    max_position_embeddings : int
        The longest that the model takes.
    max_seq_len : int, optional
        Tokens of a window. By default as many as model and text allow: a short window does not show what a long context
        reads.
    max_tokens : int, optional
        Of all windows together, at most.
    bos_id : int, optional
        The tokenizer's BOS token.

    Returns
    -------
    torch.Tensor
        int64 ``[num_windows, T]``.

    Raises
    ------
    ConfigError
        If the text does not fill a window, or a window does not fit the model.
    """
    if max_tokens is not None and max_tokens < 2:
        raise ConfigError(f"max_tokens is {max_tokens}: at least 2 are needed, one to predict from and one to predict")
    ids = ids[:max_tokens]
    length = min(max_position_embeddings, max(len(ids), 2)) if max_seq_len is None else max_seq_len
    if not 2 <= length <= max_position_embeddings:
        raise ConfigError(
            f"max_seq_len is {length}: it must be from 2 to the model's max_position_embeddings "
            f"{max_position_embeddings}"
        )
    if len(ids) < length:
        raise ConfigError(
            f"the text gives {len(ids)} tokens and a window is {length}: give a longer text or a smaller --max_seq_len"
        )
    first = [i for i in ids[:1] if i == bos_id]
    size = length - len(first)
    starts = (len(first) + n * size for n in range(len(ids) // length))
    return torch.tensor([first + ids[start : start + size] for start in starts], dtype=torch.int64)
