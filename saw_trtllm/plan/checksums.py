"""Checksums of an engine's files: recorded in its ``config.json`` when it is built, compared when it is opened."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Collection, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from saw_trtllm.checkpoint.convert import TOKENIZER_FILES
from saw_trtllm.engine.config import CONFIG_FILE, EngineConfig, WeightsSource
from saw_trtllm.engine.executor_view import SECTION
from saw_trtllm.errors import EngineError
from saw_trtllm.paths import is_file, is_folder, read_json

#: Bytes that a thread reads and hashes at a time.
_PIECE = 16 << 20


def record_checksums(folder: Path, known: Mapping[str, str] | None = None) -> None:
    """Add the checksums of all files of a folder, its ``config.json`` among them, to its ``config.json``.

    Those that are ``known``, by the file's name, are not computed again.
    """
    path = folder / CONFIG_FILE
    config = json.loads(path.read_text(encoding="utf-8"))
    _section(config).pop("checksums", None)
    names = sorted(p.name for p in folder.iterdir() if p != path)
    checksums = {name: (known or {}).get(name) or file_checksum(folder / name) for name in names}
    checksums[CONFIG_FILE] = _config_checksum(config)
    _section(config)["checksums"] = checksums
    path.write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")


def verify_engine(folder: Path, tokenizer: bool = True, only: Collection[str] | None = None) -> None:
    """Compare an engine's files with its checksums. An engine without any, of an earlier version, passes.

    Parameters
    ----------
    folder : Path
        Of an engine whose config :class:`saw_trtllm.engine.config.EngineConfig` has accepted.
    tokenizer : bool
        Whether the tokenizer's files count.
    only : collection of str, optional
        The files that count, if not all do, with those of a checkpoint that the engine has its weights in.

    Raises
    ------
    EngineError
        If a file is missing, or not as it was built; a file of the checkpoint too, if the engine has its weights there.
    """
    config = read_json(folder / CONFIG_FILE, EngineError)
    recorded = _section(config).pop("checksums", {})
    for name, expected in recorded.items():
        if (name in TOKENIZER_FILES and not tokenizer) or (only is not None and name not in only):
            continue
        path = folder / Path(name).name
        is_file(path, EngineError)  # a pipe would be waited for
        try:
            found = _config_checksum(config) if name == CONFIG_FILE else file_checksum(path)
            reason = "is not as saw-build wrote it, by its checksum"
        except OSError as e:
            found, reason = None, f"cannot be read ({e.strerror})"
        if found != expected:
            check_not_replaced(folder, recorded)
            raise EngineError(
                f"{path} {reason}: copy the engine again, build it anew, or open it as it is with --no_verify "
                "(LLM(verify=False))"
            )
    weights = EngineConfig.load(folder).saw_int4.weights
    if weights is not None and only is None:
        _verify_weights(folder, weights)


def _verify_weights(folder: Path, weights: WeightsSource) -> None:
    place = weights_folder(folder, weights)
    for name, expected in weights.checksums.items():
        path = place / Path(name).name
        try:
            found = file_checksum(path) if is_file(path, EngineError) else None
        except OSError as e:
            raise EngineError(f"{path} cannot be read ({e.strerror}): copy the checkpoint again") from e
        if found != expected:
            raise EngineError(
                f"{path} is not what the engine in {folder} was built for, by its checksum: put that back, or give the "
                f"engine these weights with saw-refit --engine_dir {folder} --checkpoint_dir {place}"
            )


def weights_folder(folder: Path, weights: WeightsSource) -> Path:
    """Where the weights of the engine in ``folder`` are.

    Raises
    ------
    EngineError
        If there is no such folder any more.
    """
    place = Path(weights.checkpoint_dir)
    if not is_folder(place, EngineError):
        raise EngineError(
            f"the engine in {folder} has its weights in {place}, which is not there: put the checkpoint back, or say "
            f"where it is now with saw-refit --engine_dir {folder} --checkpoint_dir DIR"
        )
    return place


def check_not_replaced(folder: Path, checksums: dict[str, str]) -> None:
    """Raise :class:`EngineError` if the engine is another than the one of these checksums by now."""
    if EngineConfig.load(folder).saw_int4.checksums != checksums:
        raise EngineError(f"the engine in {folder} was replaced while it was opened: open it again")


def file_checksum(path: Path) -> str:
    """SHA-256 of the SHA-256 digests of a file's pieces of 16 MiB, which all cores compute."""
    with path.open("rb") as file, ThreadPoolExecutor(os.cpu_count()) as pool:
        descriptor = file.fileno()

        def digest(start: int) -> bytes:
            return hashlib.sha256(os.pread(descriptor, _PIECE, start)).digest()

        digests = pool.map(digest, range(0, os.fstat(descriptor).st_size, _PIECE))
        return hashlib.sha256(b"".join(digests)).hexdigest()


def _config_checksum(config: dict[str, Any]) -> str:
    """Of what it says, not of how it is laid out; it cannot hold its own."""
    return hashlib.sha256(json.dumps(config, sort_keys=True).encode()).hexdigest()


def _section(config: dict[str, Any]) -> dict[str, Any]:
    """The section of this project, which an engine of TensorRT-LLM has among the model's fields."""
    return config[SECTION] if SECTION in config else config["pretrained_config"][SECTION]
