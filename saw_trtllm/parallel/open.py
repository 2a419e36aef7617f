"""Opens an engine in this process, or over as many ranks as it is split over."""

from __future__ import annotations

import threading
from collections.abc import Callable
from pathlib import Path

from saw_trtllm.backends import registry
from saw_trtllm.engine.config import EngineConfig, engine_file
from saw_trtllm.errors import ConfigError, EngineError
from saw_trtllm.parallel.config import ParallelConfig
from saw_trtllm.parallel.executor import NO_DISK, GroupExecutor
from saw_trtllm.parallel.group import RankProcesses
from saw_trtllm.parallel.processes import LocalProcesses
from saw_trtllm.parallel.ray_ranks import RayRanks
from saw_trtllm.paths import is_file
from saw_trtllm.runtime.executor import Executor
from saw_trtllm.runtime.kv_cache_config import KvCacheConfig

#: Who starts ranks: given their number, whether each has a GPU, and what ends the wait for room.
LAUNCHERS: dict[str, Callable[[int, bool, threading.Event], RankProcesses]] = {
    "ray": RayRanks,
    "processes": LocalProcesses,
}


def open_executor(folder: Path, config: EngineConfig, kv_cache: KvCacheConfig, parallel: ParallelConfig) -> Executor:
    """The executor of an engine; of one that is split over ranks, their leader.

    Raises
    ------
    SawError
        If the engine cannot be run here, or there is no room for its ranks.
    """
    if config.tp_size == 1:
        return registry.open_executor(folder, config, kv_cache)
    if kv_cache.disk_cache_dir is not None:
        raise ConfigError(NO_DISK)
    missing = [engine_file(r) for r in range(config.tp_size) if not is_file(folder / engine_file(r), EngineError)]
    if missing:
        raise EngineError(
            f"{folder} lacks {', '.join(missing)} of an engine that is split over {config.tp_size} ranks: copy it "
            "whole, or build it anew with saw-build"
        )
    needs_gpus = config.saw_int4.backend != "reference"
    launcher = LAUNCHERS[parallel.ranks]
    return GroupExecutor(folder, config, kv_cache, lambda size, ended: launcher(size, needs_gpus, ended), parallel)
