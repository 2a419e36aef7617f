"""Blocks that outlive the process: a file each, which the processes of one engine share.

A file's name is its block's key, in a folder of the fingerprint of all that gives a block's bytes their meaning. Its
bytes come with that fingerprint, the key and a checksum, so that a torn file, one of a crash or of another engine is a
miss and never a wrong text. A file takes its place whole, by a rename. The folder is kept within its size by removing
what was used longest ago, by the files' times, which a read renews.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import shutil
import tempfile
import threading
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

import numpy as np

from saw_trtllm.engine.config import EngineConfig
from saw_trtllm.errors import ConfigError
from saw_trtllm.runtime.block_table import Content
from saw_trtllm.runtime.kv_cache_config import KvCacheConfig

log = logging.getLogger(__name__)

_MAGIC = b"SAWBLOCK" + (1).to_bytes(4, "little")
_DIGEST = hashlib.sha256().digest_size
_SUFFIX, _UNFINISHED = ".sawblock", ".sawblock.tmp"
#: Threads that read, and that write: each reads or hashes about 1 GB/s.
_READERS, _WRITERS = 8, 2
#: A share of the size that is freed at a time, since what is there must be listed for it.
_FREED_SHARE = 16
#: Seconds after which an unfinished file is one of a process that has died.
_ABANDONED = 600
#: Seconds without a write after one that failed, and at most from the end of the requests to the last write.
_PAUSE, _LAST_WRITES = 10.0, 10.0


def engine_fingerprint(config: EngineConfig, rule: object) -> bytes:
    """A digest of what a block's bytes depend on beside its tokens: weights and calibration by their checksums.

    Parameters
    ----------
    config : EngineConfig
    rule : str or int
        Which steps may have computed a block.

    Raises
    ------
    ConfigError
        If the engine has no checksums.
    """
    section = config.saw_int4
    files = {name: digest for name, digest in section.checksums.items() if name.endswith((".engine", ".safetensors"))}
    if not files:
        raise ConfigError("disk_cache_dir needs an engine with checksums, and this one has none: build it anew")
    weights = section.weights.checksums if section.weights else {}
    model = config.pretrained_config.model_dump(mode="json")
    pools = [(repr(pool.format), pool.layers, config.windows[pool.table]) for pool in config.pools]
    what = [section.format_version, files, weights, model, pools, config.build_config.tokens_per_block, rule]
    return hashlib.sha256(json.dumps(what, sort_keys=True, default=str).encode()).digest()


class _File(NamedTuple):
    used: float
    size: int
    path: str


class DiskCache:
    """The files, read and written by threads of its own.

    Parameters
    ----------
    folder : Path
        Made if it is not there.
    size : int
        Bytes that all files in it may have, those of other engines too. Another process may exceed it by a sixteenth.
    fingerprint : bytes
        See :func:`engine_fingerprint`.
    block_bytes, tokens_per_block : int

    Attributes
    ----------
    num_read, num_written : int
        Blocks.

    Raises
    ------
    ConfigError
        If the folder cannot be written to, or has not so much room.
    """

    def __init__(self, folder: Path, size: int, fingerprint: bytes, block_bytes: int, tokens_per_block: int) -> None:
        self.num_read = self.num_written = 0
        self._root, self._size, self._fingerprint = folder, size, fingerprint
        self._folder = folder / fingerprint.hex()[:16]
        self._tokens_bytes = 4 * tokens_per_block
        self._block_bytes = block_bytes
        self._file_bytes = len(_MAGIC) + 3 * _DIGEST + self._tokens_bytes + block_bytes + _DIGEST
        self._granted = 0  # bytes that may be written before the folder is looked at again
        self._paused_until = 0.0
        self._warned: set[str] = set()
        self._bad: set[bytes] = set()  # keys of files that cannot be read
        self._lock = threading.Lock()  # of who removes files
        try:
            self._folder.mkdir(mode=0o700, parents=True, exist_ok=True)
            with tempfile.TemporaryFile(dir=self._folder):
                pass
            free, used = shutil.disk_usage(folder).free, sum(file.size for file in self._files())
        except OSError as e:
            raise ConfigError(
                f"disk_cache_dir {folder} cannot be used ({e}): give a folder that can be written to"
            ) from e
        if size > free + used or size < self._file_bytes:
            raise ConfigError(
                f"disk_cache_size is {size} bytes, where a block takes {self._file_bytes} and {folder} has room for "
                f"{free + used}: give it a size between the two"
            )
        self._readers = ThreadPoolExecutor(_READERS, thread_name_prefix="saw-read")
        self._writers = ThreadPoolExecutor(_WRITERS, thread_name_prefix="saw-write")
        self._writes: set[Future[None]] = set()

    @classmethod
    def open(cls, config: EngineConfig, cache: KvCacheConfig, rule: object) -> DiskCache | None:
        """What a :class:`KvCacheConfig` asks for, for an engine's blocks; ``rule`` as of :func:`engine_fingerprint`."""
        if cache.disk_cache_dir is None:
            return None
        tokens = config.build_config.tokens_per_block
        fingerprint, folder = engine_fingerprint(config, rule), Path(cache.disk_cache_dir)
        return cls(folder, cache.disk_cache_size, fingerprint, config.block_bytes, tokens)

    def stats(self) -> dict[str, int]:
        """Its part of :class:`saw_trtllm.runtime.stats.Stats`."""
        return {"disk_written_blocks_total": self.num_written, "disk_read_blocks_total": self.num_read}

    def holds(self, key: bytes) -> bool:
        """Whether there is a file of a block's name."""
        return key not in self._bad and os.path.exists(self._path(key))

    def read(self, key: bytes, block: np.ndarray) -> Future[Content | None]:
        """Begin to read a block's bytes into ``block``, uint8 ``[block_bytes]``. It gives None if it cannot."""
        return self._readers.submit(self._read, key, block)

    def wait(self, reads: Sequence[Future[Content | None]]) -> None:
        """Wait until one of some reads has ended."""
        wait(reads, return_when=FIRST_COMPLETED)

    def write(self, content: Content, block: np.ndarray) -> Future[None]:
        """Queue a block, whose bytes must stay until that is done or cancelled."""
        future = self._writers.submit(self._write, content, block)
        self._writes.add(future)
        future.add_done_callback(self._writes.discard)
        return future

    def close(self) -> None:
        """Write what is queued, as far as the time reaches, and end the threads."""
        self._readers.shutdown(cancel_futures=True)
        wait(list(self._writes), _LAST_WRITES)
        self._writers.shutdown(cancel_futures=True)

    def _path(self, key: bytes) -> str:
        name = key.hex()
        return f"{self._folder}/{name[:2]}/{name}{_SUFFIX}"

    def _read(self, key: bytes, block: np.ndarray) -> Content | None:
        path = self._path(key)
        head = bytearray(self._file_bytes - self._block_bytes - _DIGEST)
        checksum = bytearray(_DIGEST)
        try:
            with open(path, "rb", buffering=0) as file:
                whole = os.fstat(file.fileno()).st_size == self._file_bytes
                whole = whole and os.readv(file.fileno(), [head, block.data, checksum]) == self._file_bytes
            os.utime(path)
        except OSError as e:
            self._bad.add(key)
            self._warn("missing", "a block in %s cannot be read (%s), and is computed anew", path, e)
            return None
        start = len(_MAGIC)
        fingerprint, own, parent, tokens = (
            bytes(head[start + i * _DIGEST : start + (i + 1) * _DIGEST if i < 3 else None]) for i in range(4)
        )
        if not whole or _checksum(head, block) != checksum:
            reason = "is torn or damaged"
        elif (bytes(head[:start]), fingerprint, own) != (_MAGIC, self._fingerprint, key):
            reason = "is another engine's"
        else:
            self.num_read += 1
            return Content(key, parent, np.frombuffer(tokens, "<i4").astype(np.int32))
        self._warn(reason, "the file %s %s: it is removed, and its block computed anew", path, reason)
        try:
            os.unlink(path)
        except OSError:
            self._bad.add(key)
        return None

    def _write(self, content: Content, block: np.ndarray) -> None:
        if time.monotonic() < self._paused_until:
            return
        path = self._path(content.key)
        unfinished = f"{path}.{os.getpid()}.{threading.get_ident()}{_UNFINISHED}"
        try:
            if os.path.exists(path):
                os.utime(path)
                return
            self._make_room()
            os.makedirs(os.path.dirname(path), mode=0o700, exist_ok=True)
            tokens = np.asarray(content.tokens, "<i4").tobytes()
            head = b"".join((_MAGIC, self._fingerprint, content.key, content.parent, tokens))
            with open(unfinished, "xb", opener=_private) as file:
                for part in (head, block.data, _checksum(head, block)):
                    file.write(part)
            os.rename(unfinished, path)
            self._bad.discard(content.key)
            self.num_written += 1
        except OSError as e:
            self._paused_until = time.monotonic() + _PAUSE
            self._warn("write", "a block cannot be written to %s (%s): the cache goes on without", self._root, e)
            with suppress(OSError):
                os.unlink(unfinished)

    def _make_room(self) -> None:
        """Let a file more be within the size."""
        with self._lock:
            if self._granted < self._file_bytes:
                self._granted = max(self._size // _FREED_SHARE, self._file_bytes)
                self._trim(self._size - self._granted)
            self._granted -= self._file_bytes

    def _trim(self, size: int) -> None:
        files = sorted(self._files())
        excess = sum(file.size for file in files) - size
        for file in files:
            abandoned = file.path.endswith(_UNFINISHED) and time.time() - file.used > _ABANDONED
            if excess > 0 or abandoned:
                with suppress(OSError):  # another process may have removed it
                    os.unlink(file.path)
                excess -= file.size

    def _files(self) -> Iterator[_File]:
        for folder, _, names in os.walk(self._root):
            for name in names:
                if name.endswith((_SUFFIX, _UNFINISHED)):
                    with suppress(OSError):
                        status = os.stat(path := os.path.join(folder, name))
                        yield _File(status.st_mtime, status.st_size, path)

    def _warn(self, kind: str, message: str, *args: object) -> None:
        log.log(logging.DEBUG if kind in self._warned else logging.WARNING, message, *args)
        self._warned.add(kind)


def _checksum(head: bytes | bytearray, block: np.ndarray) -> bytes:
    digest = hashlib.sha256(head)
    digest.update(block.data)
    return digest.digest()


def _private(path: str, flags: int) -> int:
    """A user's text is nobody else's to read."""
    return os.open(path, flags, 0o600)
