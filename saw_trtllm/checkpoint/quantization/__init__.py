"""Dialects of quantized checkpoints: a file each, and the table of them."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, get_args

from saw_trtllm.checkpoint.families.family import KeyRule, Treatment
from saw_trtllm.checkpoint.quantization.awq import AWQ
from saw_trtllm.checkpoint.quantization.compressed_tensors import COMPRESSED_TENSORS
from saw_trtllm.checkpoint.quantization.dialect import CACHE_SCALES, Dialect, Linear, StoredWeight
from saw_trtllm.checkpoint.quantization.fbgemm_fp8 import FBGEMM_FP8
from saw_trtllm.checkpoint.quantization.fp8 import FP8
from saw_trtllm.checkpoint.quantization.gptq import GPTQ
from saw_trtllm.checkpoint.quantization.modelopt import MODELOPT
from saw_trtllm.checkpoint.quantization.tensorrt_llm import TENSORRT_LLM
from saw_trtllm.errors import CheckpointError
from saw_trtllm.paths import is_file, read_json

__all__ = [
    "CACHE_SCALES",
    "DIALECTS",
    "TENSORRT_LLM",
    "Dialect",
    "Linear",
    "StoredWeight",
    "find_dialect",
    "named_dialect",
]

#: Those of Hugging Face folders.
DIALECTS = (MODELOPT, AWQ, GPTQ, COMPRESSED_TENSORS, FBGEMM_FP8, FP8)
_BY_NAME = {dialect.name: dialect for dialect in DIALECTS}


def named_dialect(raw: dict[str, Any], path: Path) -> tuple[Dialect, dict[str, Any]] | None:
    """The dialect that a ``config.json`` names, with its settings; ``path`` is for the messages.

    Raises
    ------
    CheckpointError
        If it is none of ours.
    """
    key = next((key for key in ("quantization_config", "compression_config") if raw.get(key)), None)
    if key is None:
        return None
    own = raw[key]
    if not isinstance(own, dict):
        raise CheckpointError(f"{path} sets {key} to {own!r}, but a JSON object is needed")
    default = "compressed-tensors" if "config_groups" in own and "quant_algo" not in own else "none"
    name = str(own.get("quant_method", default)).replace("_tensors", "-tensors")
    if name not in _BY_NAME:
        raise CheckpointError(
            f"{path} sets the quant_method of its {key} to {name!r}, which is not supported: use a model quantized in "
            f"one of {', '.join(_BY_NAME)}, or the 16-bit model"
        )
    return _BY_NAME[name], own


def find_dialect(folder: Path, raw: dict[str, Any]) -> tuple[Dialect, Callable[[Linear], StoredWeight | None]] | None:
    """The dialect of a Hugging Face folder and what reads its layers, or None of a model that is not quantized.

    Parameters
    ----------
    folder : Path
    raw : dict
        Its ``config.json``.

    Raises
    ------
    CheckpointError
        If the dialect, or a setting of it, is not supported, or two dialects are named.
    """
    named = named_dialect(raw, folder / "config.json")
    found = {} if named is None else {named[0].name: folder / "config.json"}
    for dialect in DIALECTS:
        if dialect.file is not None and is_file(folder / dialect.file, CheckpointError):
            found.setdefault(dialect.name, folder / dialect.file)
    if len(found) > 1:
        (first, here), (second, there) = list(found.items())[:2]
        raise CheckpointError(
            f"{here} says that the weights are quantized by {first!r} and {there} by {second!r}: keep the file that "
            "belongs to these weights"
        )
    for name, path in found.items():
        settings = read_json(path, CheckpointError) if named is None else named[1]
        return _BY_NAME[name], _BY_NAME[name].open(settings, path)
    return None


def markdown_tables() -> str:
    """What becomes of each dialect's keys, as docs/weights.md shows it."""
    tables: list[tuple[str, Iterable[KeyRule]]] = []
    for dialect in (*DIALECTS, TENSORRT_LLM):
        where = f"`{dialect.name}`" + (f", `{dialect.file}`" if dialect.file else "")
        tables.append((f"{dialect.library} ({where})", dialect.keys))
        tables += [(f"{dialect.library}: {place}", rules) for place, rules in dialect.sections.items()]
    text = []
    for title, rules in tables:
        text += [f"### {title}", "", "| key | | |", "|---|---|---|"]
        for rule in sorted(rules, key=lambda rule: get_args(Treatment).index(rule.treatment)):
            unless = ", ".join(f"`{value!r}`" for value in rule.unless)
            treatment = rule.treatment + (f" unless {unless}" if unless else "")
            text.append(f"| {', '.join(f'`{key}`' for key in rule.keys)} | {treatment} | {rule.note} |")
        text.append("")
    return "\n".join(text)
