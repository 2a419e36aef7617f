"""Writing a checkpoint in TensorRT-LLM's format."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path

import numpy as np

from saw_trtllm.checkpoint.checkpoint import Checkpoint
from saw_trtllm.checkpoint.layout import check_tp_size, shard, shard_format, shard_shape, shard_weight
from saw_trtllm.checkpoint.quantization.tensorrt_llm import with_one_scale, written_section, written_tensors
from saw_trtllm.checkpoint.quantization.tensorrt_llm import write as write_quantized
from saw_trtllm.checkpoint.reader import NUMPY_DTYPES, is_finite
from saw_trtllm.checkpoint.tensorrt_llm import rank_file, write_config
from saw_trtllm.checkpoint.writer import SafetensorsWriter
from saw_trtllm.errors import CheckpointError, ConfigError
from saw_trtllm.files import replacing_folder
from saw_trtllm.model.config import ModelConfig
from saw_trtllm.model.quantization import TensorSpec
from saw_trtllm.paths import copy_file, is_file, read_json

#: What stands beside the weights and is copied with them, as far as it is there.
TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "tokenizer.model",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "chat_template.jinja",
    "chat_template.json",
    "generation_config.json",
)


def save_checkpoint(
    ckpt: Checkpoint,
    output_dir: str | Path,
    tp_size: int = 1,
    dtype: str = "auto",
    progress: Callable[[str], None] | None = None,
) -> int:
    """Write a checkpoint in TensorRT-LLM's format, split over ``tp_size`` ranks.

    All ranks are written side by side, one tensor after the other: each tensor is read once, and no more than one is in
    memory. The tokenizer's files are copied along. A checkpoint that is there stays until the new one is whole.

    Parameters
    ----------
    ckpt : Checkpoint
        The model.
    output_dir : str or Path
        Made if it is not there; a checkpoint in it is replaced.
    tp_size : int
        Ranks to split the model over.
    dtype : str
        "float16", "bfloat16", "float32", or "auto" for the model's own.
    progress : callable, optional
        Called with the name of each tensor that has been written.

    Returns
    -------
    int
        Bytes of weights and config written.

    Raises
    ------
    ConfigError
        If ``tp_size`` does not split the model, TensorRT-LLM has no checkpoint of its quantized weights, or the folder
        cannot be written.
    CheckpointError
        If a weight is too large for ``dtype``.
    """
    check_tp_size(ckpt.config, tp_size)
    tokenizer_files(ckpt.folder)  # what cannot be copied is said before anything is written
    dtype = ckpt.config.dtype if dtype == "auto" else dtype
    output_dir = Path(output_dir)
    try:
        output_dir.mkdir(parents=True, exist_ok=True)
        _check_replaceable(ckpt, output_dir)
        return _write(ckpt, output_dir, tp_size, dtype, progress)
    except OSError as e:
        raise ConfigError(
            f"{output_dir} cannot be written ({e.strerror or e}): choose another output folder or make room"
        ) from e


def copy_tokenizer_files(source: Path, output_dir: Path) -> list[str]:
    """Copy the tokenizer's files that ``source`` has, and return their names."""
    names = tokenizer_files(source)
    for name in names:
        copy_file(source / name, output_dir / name, CheckpointError)
    return names


def tokenizer_files(folder: Path) -> list[str]:
    """Name the tokenizer's files that ``folder`` has.

    They are copied as they are and served, so none may be a link to somewhere else: a model's folder from anywhere
    could name any file of this machine. A folder of the Hugging Face hub's cache has nothing but links, from
    ``models--ORG--NAME/snapshots/COMMIT`` to files that are named by their hash in ``models--ORG--NAME/blobs``; links
    to such files are taken, as are those that stay in the folder.

    Raises
    ------
    CheckpointError
        If one is a link to elsewhere, no regular file, or may not be read.
    """
    names = [name for name in TOKENIZER_FILES if is_file(folder / name, CheckpointError)]
    home = Path(os.path.realpath(folder))
    for name in names:
        target = Path(os.path.realpath(folder / name))
        if not target.is_relative_to(home) and not _in_hub_cache(target):
            raise CheckpointError(
                f"{folder / name} is a link to {target}, outside the model's folder: put a copy of the file there"
            )
    return names


def _in_hub_cache(path: Path) -> bool:
    blobs = path.parent
    named_by_hash = re.fullmatch(r"[0-9a-f]{40}|[0-9a-f]{64}", path.name)
    return named_by_hash is not None and blobs.name == "blobs" and blobs.parent.name.startswith("models--")


def _check_replaceable(ckpt: Checkpoint, output_dir: Path) -> None:
    if output_dir.resolve() == ckpt.folder.resolve():
        raise ConfigError(f"{output_dir} is the folder that the model is read from: choose another output folder")
    config = output_dir / "config.json"
    if is_file(config) and "architecture" not in read_json(config, ConfigError):
        raise ConfigError(f"{output_dir} holds another kind of model or engine: choose another output folder")


def _write(ckpt: Checkpoint, output_dir: Path, tp_size: int, dtype: str, progress: Callable[[str], None] | None) -> int:
    config = ckpt.config.model_copy(deep=True)
    formats = {name: shard_format(name, f, config, tp_size) for name, f in ckpt.formats.items()}
    config.quantization = written_section(ckpt.formats, config, tp_size)
    text = json.dumps(write_config(config, dtype, tp_size), indent=2) + "\n"
    # A source with a split embedding is written with a whole one on each rank.
    (config.model_extra or {}).pop("use_parallel_embedding", None)
    tensors: dict[str, TensorSpec] = {}
    for name in ckpt.names():
        shape = shard_shape(name, config, tp_size)
        if name in formats:
            tensors |= written_tensors(name, shape, formats[name], dtype)
        else:
            tensors[name] = TensorSpec(shape, dtype)
    names = [rank_file(rank) for rank in range(tp_size)]
    with replacing_folder(output_dir, ("config.json", rank_file("*"), *TOKENIZER_FILES)) as part:
        with ExitStack() as stack:
            writers = [stack.enter_context(SafetensorsWriter(part / name, tensors)) for name in names]
            for name in ckpt.names():
                for rank, arrays in enumerate(_shards(ckpt, name, config, tp_size, dtype)):
                    for written, array in arrays.items():
                        writers[rank].write(written, array)
                if progress is not None:
                    progress(name)
        copy_tokenizer_files(ckpt.folder, part)
        (part / "config.json").write_text(text, encoding="utf-8")
        return sum((part / name).stat().st_size for name in ("config.json", *names))


def _shards(
    ckpt: Checkpoint, name: str, config: ModelConfig, tp_size: int, dtype: str
) -> Iterator[dict[str, np.ndarray]]:
    """What each rank has of a tensor, by the names that it is written under."""
    if name in ckpt.formats:
        weight = with_one_scale(name, ckpt.load_quantized(name), config)
        for rank in range(tp_size):
            yield write_quantized(name, shard_weight(name, weight, config, tp_size, rank), dtype)
        return
    array = cast(ckpt.load_finite(name), dtype, ckpt.where(name))
    for rank in range(tp_size):
        yield {name: shard(name, array, config, tp_size, rank)}


def cast(array: np.ndarray, dtype: str, where: str) -> np.ndarray:
    """Bring a tensor of finite weights to ``dtype``, and reject one that becomes infinite; ``where`` it comes from."""
    target = NUMPY_DTYPES[dtype]
    if array.dtype == target:
        return array
    with np.errstate(over="ignore"):
        result = array.astype(target)
    if not is_finite(result):
        raise CheckpointError(f"{where} has weights too large for {dtype}: give --dtype bfloat16")
    return result
