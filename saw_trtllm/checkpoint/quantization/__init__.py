"""Dialects of quantized checkpoints: a file each, and the table of them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

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

__all__ = ["CACHE_SCALES", "DIALECTS", "TENSORRT_LLM", "Dialect", "Linear", "StoredWeight", "find_dialect"]

#: Those of Hugging Face folders.
DIALECTS = (MODELOPT, AWQ, GPTQ, COMPRESSED_TENSORS, FBGEMM_FP8, FP8)
_BY_NAME = {dialect.name: dialect for dialect in DIALECTS}


def find_dialect(folder: Path, raw: dict[str, Any]) -> Callable[[Linear], StoredWeight | None] | None:
    """What reads the quantized layers of a Hugging Face folder, or None of a model that is not quantized.

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
    path = folder / "config.json"
    own = raw.get("quantization_config") or raw.get("compression_config")
    files = [(d, folder / d.file) for d in DIALECTS if d.file is not None]
    beside = [(d, file) for d, file in files if is_file(file, CheckpointError)]
    if own is None:
        if not beside:
            return None
        dialect, file = beside[0]
        _check_one({dialect.name: file, **{d.name: f for d, f in beside}})
        return dialect.open(read_json(file, CheckpointError), file)
    if not isinstance(own, dict):
        raise CheckpointError(f"{path} sets quantization_config to {own!r}, but a JSON object is needed")
    default = "compressed-tensors" if "config_groups" in own and "quant_algo" not in own else "none"
    name = str(own.get("quant_method", default)).replace("compressed_tensors", "compressed-tensors")
    if name not in _BY_NAME:
        raise CheckpointError(
            f"{path} has weights quantized by {name!r}, which is not supported: use a model quantized in one of "
            f"{', '.join(_BY_NAME)}, or the 16-bit model"
        )
    _check_one({name: path, **{d.name: f for d, f in beside}})
    return _BY_NAME[name].open(own, path)


def _check_one(found: dict[str, Path]) -> None:
    if len(found) > 1:
        (first, here), (second, there) = list(found.items())[:2]
        raise CheckpointError(
            f"{here} says that the weights are quantized by {first!r} and {there} by {second!r}: keep the file that "
            "belongs to these weights"
        )
