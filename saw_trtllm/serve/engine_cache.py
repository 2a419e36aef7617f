"""Engines built from checkpoints when they are served, kept for the next time.

An engine's key is all that it depends on: the checkpoint's files, the plan (cache format, calibration, limits), the
versions of this package, of TensorRT and of the plugins' library, and the GPU. A folder of the cache is built under a
lock, served under a shared one, and removed when the cache is too large and nobody holds it, the least recently used
first.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import json
import logging
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from saw_trtllm.build import build, plan_build
from saw_trtllm.engine.config import CONFIG_FILE
from saw_trtllm.errors import CheckpointError, ConfigError
from saw_trtllm.paths import is_file, reading
from saw_trtllm.plan.checksums import file_checksum
from saw_trtllm.plan.options import BuildOptions
from saw_trtllm.plan.plan import BuildPlan
from saw_trtllm.plugins.library import KERNELS_LIBRARY, library_path
from saw_trtllm.version import __version__

log = logging.getLogger(__name__)

#: Files up to this size are known by their content, larger ones, the weights, by name, size, time and both ends.
_SMALL = 64 << 20
_END = 1 << 20

#: Options that change nothing in an engine.
_IRRELEVANT = {"output_dir", "model_dir", "checkpoint_dir", "input_timing_cache", "output_timing_cache", "workers"}


def default_folder() -> Path:
    """Where engines are kept: ``$SAW_CACHE_DIR``, or the user's cache."""
    folder = os.environ.get("SAW_CACHE_DIR")
    if folder:
        return Path(folder)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "saw_trtllm" / "engines"


@contextlib.contextmanager
def cached_engine(
    options: BuildOptions,
    folder: Path,
    max_bytes: int,
    announce: Callable[[BuildPlan, bool], None] = lambda plan, found: None,
) -> Iterator[Path]:
    """Give the folder of a checkpoint's engine, built if need be; it stays while the block lasts.

    Parameters
    ----------
    options : BuildOptions
        Its ``output_dir`` counts for nothing.
    folder : Path
        The cache.
    max_bytes : int
        What the cache may hold; the engine in use counts, and is kept however large it is.
    announce : callable, optional
        Told of the plan before it is built, and whether an engine was found.

    Raises
    ------
    SawError
        If the engine cannot be built, or the cache not be written.
    """
    plan = plan_build(options)
    key = engine_key(plan, options)
    target = folder / key
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock = (folder / f"{key}.lock").open("a")
    except OSError as e:
        raise ConfigError(
            f"the engine cache {folder} cannot be written ({e.strerror}): give another --cache_dir, or --no_cache"
        ) from e
    with lock:
        fcntl.flock(lock, fcntl.LOCK_SH)  # whoever builds the same engine is waited for, and who uses it is not
        found = is_file(target / CONFIG_FILE)
        if not found:
            fcntl.flock(lock, fcntl.LOCK_EX)
            found = is_file(target / CONFIG_FILE)  # another may have come before
        announce(plan, found)
        if not found:
            build(plan_build(options.model_copy(update={"output_dir": target})))
        fcntl.flock(lock, fcntl.LOCK_SH)
        os.utime(lock.name)
        _evict(folder, max_bytes)
        yield target


@contextlib.contextmanager
def uncached_engine(
    options: BuildOptions, announce: Callable[[BuildPlan, bool], None] = lambda plan, found: None
) -> Iterator[Path]:
    """Give the folder of a checkpoint's engine, which is removed after the block."""
    with tempfile.TemporaryDirectory(prefix="saw-engine-") as folder:
        plan = plan_build(options.model_copy(update={"output_dir": Path(folder) / "engine"}))
        announce(plan, False)
        build(plan)
        yield plan.output_dir


def engine_key(plan: BuildPlan, options: BuildOptions) -> str:
    """All that an engine depends on, as a name."""
    backend = plan.config.saw_int4.backend
    parts: dict[str, Any] = {
        "package": __version__,
        "checkpoint": fingerprint(plan.checkpoint.folder),
        "weights": str(plan.checkpoint.folder.absolute()) if options.strip_plan else None,
        "config": plan.config.model_dump(mode="json"),
        "options": options.model_dump(mode="json", exclude=_IRRELEVANT | {"calibration"}),
        "calibration": file_checksum(options.calibration) if options.calibration else None,
        "machine": [backend, plan.backend.available()],
        "plugins": _libraries() if backend != "reference" else None,
    }
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:32]


def _libraries() -> dict[str, str]:
    """The plugins' library and what it links to."""
    return {path.name: file_checksum(path) for path in sorted(library_path(KERNELS_LIBRARY).parent.glob("lib*.so"))}


def fingerprint(folder: Path) -> dict[str, Any]:
    """What tells a checkpoint from any other, and from itself after a change."""
    with reading(folder, CheckpointError):
        files = sorted(path for path in folder.iterdir() if path.is_file())
    found = {}
    for path in files:
        with reading(path, CheckpointError):
            found[path.name] = _file_fingerprint(path)
    return found


def _file_fingerprint(path: Path) -> Any:
    status = path.stat()
    if status.st_size <= _SMALL:
        return file_checksum(path)
    with path.open("rb") as file:
        ends = hashlib.sha256(file.read(_END))
        file.seek(max(0, status.st_size - _END))
        ends.update(file.read(_END))
    return [status.st_size, status.st_mtime_ns, ends.hexdigest()]


def _evict(folder: Path, max_bytes: int) -> None:
    """Remove engines that nobody holds, the least recently used first, until the others fit."""
    locks = sorted(folder.glob("*.lock"), key=lambda path: path.stat().st_mtime)
    sizes = {path: _size(path.with_suffix("")) for path in locks}
    total = sum(sizes.values())
    for path in locks:
        if total <= max_bytes:
            return
        with path.open("a") as lock, contextlib.suppress(BlockingIOError):
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            shutil.rmtree(path.with_suffix(""), ignore_errors=True)
            total -= sizes[path]
            log.info("the engine %s was removed from the cache, which may hold %d bytes", path.stem, max_bytes)


def _size(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.iterdir()) if folder.is_dir() else 0
