"""Whether the ranks that open an engine are those that it was built for."""

from __future__ import annotations

import hashlib
from pathlib import Path

import numpy as np

from saw_trtllm.engine.config import EngineConfig
from saw_trtllm.errors import EngineError
from saw_trtllm.runtime.collectives import Collectives
from saw_trtllm.version import __version__

#: Bytes of a release's name.
_RELEASE = 32


def check_ranks(folder: Path, config: EngineConfig, collectives: Collectives) -> None:
    """Reject a group of another size than the engine's, or one whose ranks have different engines or releases.

    Raises
    ------
    EngineError
    """
    if collectives.size != config.tp_size:
        raise EngineError(
            f"the engine in {folder} is split over {config.tp_size} ranks and {collectives.size} opened it: open it "
            f"with {config.tp_size}, or build it anew with saw-build --tp_size {collectives.size}"
        )
    ours = build_id(config)
    for rank, theirs in enumerate(collectives.all_gather(np.frombuffer(ours, np.uint8))):
        check_build(rank, theirs.tobytes(), f"rank {collectives.rank}", ours)


def build_id(config: EngineConfig) -> bytes:
    """What tells a build of an engine, and this release, from another: the release, filled up, and a digest.

    The digest is of the engine's config, which holds the checksums of all its files: it tells builds of one model
    apart too.
    """
    return __version__.encode().ljust(_RELEASE) + hashlib.sha256(config.model_dump_json().encode()).digest()


def check_build(rank: int, theirs: bytes, other: str, ours: bytes) -> None:
    """Reject a rank with another :func:`build_id` than some other process has.

    Parameters
    ----------
    rank : int
    theirs : bytes
        What it has.
    other : str
        Who else, in words.
    ours : bytes
        What that has.

    Raises
    ------
    EngineError
    """
    releases = [build[:_RELEASE].decode().strip() for build in (theirs, ours)]
    if releases[0] != releases[1]:
        raise EngineError(
            f"rank {rank} runs saw-trtllm {releases[0]} and {other} {releases[1]}: install one release on all machines"
        )
    if theirs != ours:
        raise EngineError(
            f"rank {rank} has another build of the engine than {other}: copy one engine folder to all machines"
        )
