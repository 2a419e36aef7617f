"""The families of models: a file each, and the table of them."""

from __future__ import annotations

from pathlib import Path

from saw_trtllm.checkpoint.families.family import Family, KeyRule
from saw_trtllm.checkpoint.families.gemma2 import GEMMA2
from saw_trtllm.checkpoint.families.gemma3 import GEMMA3
from saw_trtllm.checkpoint.families.llama import LLAMA
from saw_trtllm.checkpoint.families.mistral import MISTRAL
from saw_trtllm.checkpoint.families.qwen2 import QWEN2
from saw_trtllm.checkpoint.families.qwen3 import QWEN3
from saw_trtllm.errors import CheckpointError
from saw_trtllm.model.config import ModelConfig

__all__ = ["FAMILIES", "FAMILY_NAMES", "Family", "KeyRule", "family_of", "find_family"]

FAMILIES = (LLAMA, MISTRAL, QWEN2, QWEN3, GEMMA2, GEMMA3)
#: What ``--model`` takes.
FAMILY_NAMES = tuple(family.name for family in FAMILIES)
_BY_ARCHITECTURE = {family.architecture: family for family in FAMILIES}


def find_family(architecture: str, path: Path) -> Family:
    """The family of an architecture; reject the checkpoint whose config is at ``path`` if there is none."""
    if architecture not in _BY_ARCHITECTURE:
        raise CheckpointError(
            f"{path} is of architecture {architecture}, which is not supported: use one of "
            f"{', '.join(_BY_ARCHITECTURE)}"
        )
    return _BY_ARCHITECTURE[architecture]


def family_of(config: ModelConfig) -> Family:
    """The family of a model that was read."""
    return _BY_ARCHITECTURE[config.architecture]
