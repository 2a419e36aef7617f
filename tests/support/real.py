"""Text for the tests of real checkpoints."""

from __future__ import annotations

import pydoc_data.topics
from pathlib import Path

import torch

from saw_trtllm.checkpoint import Checkpoint
from saw_trtllm.eval.text import load_tokenizer


def topics(first: int, last: int) -> str:
    """English prose with some code: topics of Python's reference manual, which every Python has."""
    return "\n\n".join(text for _, text in sorted(pydoc_data.topics.topics.items())[first:last])


def windows(folder: Path, text: str, count: int, length: int) -> torch.Tensor:
    """The text's first tokens, int64 ``[count, length]``."""
    ids = load_tokenizer(Checkpoint.open(folder)).encode(text)[: count * length]
    return torch.tensor(ids).view(count, length)
