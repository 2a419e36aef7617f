"""The tokens that end a text, as transformers' ``generate`` finds them."""

from __future__ import annotations

import reprlib
from pathlib import Path
from typing import Any

from saw_trtllm.errors import CheckpointError
from saw_trtllm.paths import is_file, read_json


def read_end_ids(folder: Path) -> tuple[int, ...] | None:
    """End tokens of a Hugging Face folder, a TensorRT-LLM checkpoint or an engine.

    ``GenerationConfig.from_pretrained`` takes only generation_config.json where it is there, whether it names an end
    token or not, and config.json otherwise.

    Returns
    -------
    tuple of int or None
        None if neither file says anything: it may be there, but is TensorRT-LLM's and has no word for it.

    Raises
    ------
    CheckpointError
        If a file cannot be read, or its end tokens are no token ids.
    """
    generation, config = folder / "generation_config.json", folder / "config.json"
    if is_file(generation, CheckpointError):
        return _ids(read_json(generation, CheckpointError), generation)
    raw = read_json(config, CheckpointError) if is_file(config, CheckpointError) else {}
    raw = raw.get("pretrained_config", raw)
    return _ids(raw, config) if "eos_token_id" in raw or "architectures" in raw else None


def _ids(config: dict[str, Any], path: Path) -> tuple[int, ...]:
    value = config.get("eos_token_id")
    ids = [] if value is None else value if isinstance(value, list) else [value]
    if not all(isinstance(i, int) and not isinstance(i, bool) and i < 1 << 31 for i in ids):
        raise CheckpointError(f"{path} has eos_token_id {reprlib.repr(value)}: it must be a token id or a list of them")
    return tuple(ids)
