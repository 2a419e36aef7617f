"""How large the KV cache of an :class:`LLM` is."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import psutil

from saw_trtllm.errors import ConfigError
from saw_trtllm.runtime.keywords import check_keywords, config_of, is_number, shown


@dataclass(frozen=True)
class KvCacheConfig:
    """How large the KV cache is, and whether its blocks are found again.

    Parameters
    ----------
    max_tokens : int, optional
        Tokens that the pool holds; where windows bound what a sequence holds, in sequences of ``max_seq_len``. By
        default what the memory allows, and at most what ``max_batch_size`` such sequences need.
    free_gpu_memory_fraction : float
        Share of the free memory (the host's, for the reference backend) that the pool may take.
    enable_block_reuse : bool
        Whether what was computed, of a prompt or of a generated text, is found again by a prompt that begins with it.
    enable_partial_reuse : bool
        Whether a match may end within a block, whose rows are then copied.
    deterministic : bool
        Whether a request's text must not depend on what is in the cache. A token's rows depend a little on what was
        computed beside it: in a 4-bit cache on whether its neighbors were read from the cache, on a GPU on the number
        of rows in the products. Then prefixes are reused in whole prefill chunks, generated text is not, and a
        preempted request replays its text token by token.
    host_cache_size : int
        Bytes of host memory, pinned for a GPU, for blocks that leave the pool: they come back before the request that
        needs them runs.
    disk_cache_dir : path, optional
        A folder for blocks that outlive the process, by way of the host's: their rows and their tokens, in files that
        the processes of one engine share.
    disk_cache_size : int
        Bytes that the folder's files may have.

    Raises
    ------
    ConfigError
        If a size is not above 0, the fraction is above 1, or a name is not one of these.
    """

    max_tokens: int | None = None
    free_gpu_memory_fraction: float = 0.9
    enable_block_reuse: bool = True
    enable_partial_reuse: bool = True
    deterministic: bool = False
    host_cache_size: int = 0
    disk_cache_dir: Path | str | None = None
    disk_cache_size: int = 0

    def __new__(cls, *_: Any, **named: Any) -> KvCacheConfig:
        """Reject the names of arguments that it does not have."""
        check_keywords(cls.__name__, named, [f.name for f in fields(cls)], ConfigError)
        return super().__new__(cls)

    def __post_init__(self) -> None:
        tokens, fraction = self.max_tokens, self.free_gpu_memory_fraction
        if tokens is not None and not (is_number(tokens, whole=True) and tokens >= 1):
            raise ConfigError(f"the KV cache's max_tokens is {shown(tokens)}: it must be a whole number of at least 1")
        if not (is_number(fraction) and 0 < fraction <= 1):
            raise ConfigError(
                f"the KV cache's free_gpu_memory_fraction is {shown(fraction)}: it must be above 0 and at most 1"
            )
        size = self.host_cache_size
        if not (is_number(size, whole=True) and size >= 0):
            raise ConfigError(
                f"the KV cache's host_cache_size is {shown(size)}: give a whole number of bytes, 0 for none"
            )
        if size and size > (available := psutil.virtual_memory().available):
            raise ConfigError(
                f"the KV cache's host_cache_size is {size} bytes and this machine has {available} left: give it less"
            )
        self._check_disk()
        for name in ("enable_block_reuse", "enable_partial_reuse", "deterministic"):
            if not isinstance(getattr(self, name), bool):
                raise ConfigError(f"the KV cache's {name} is {shown(getattr(self, name))}: it must be True or False")

    def _check_disk(self) -> None:
        folder, size = self.disk_cache_dir, self.disk_cache_size
        if folder is not None and not (isinstance(folder, Path | str) and str(folder)):
            raise ConfigError(f"the KV cache's disk_cache_dir is {shown(folder)}: give a folder, or None")
        if not (is_number(size, whole=True) and size >= 0):
            raise ConfigError(f"the KV cache's disk_cache_size is {shown(size)}: give a whole number of bytes")
        if (folder is None) != (size == 0):
            raise ConfigError(
                f"the KV cache's disk_cache_dir is {shown(folder)} and its disk_cache_size {size}: give both or neither"
            )
        if folder is not None and not (self.host_cache_size and self.enable_block_reuse):
            raise ConfigError(
                "the KV cache's disk_cache_dir needs a host_cache_size, through whose memory blocks come and go, and "
                "enable_block_reuse"
            )

    @classmethod
    def of(cls, value: KvCacheConfig | Mapping[str, Any] | None) -> KvCacheConfig:
        """Make one out of what a user gives; see :func:`saw_trtllm.runtime.keywords.config_of`."""
        return config_of(cls, value, "kv_cache_config")
