"""Whether the ranks that open an engine are those that it was built for."""

from __future__ import annotations

import hashlib
from pathlib import Path

import numpy as np

from saw_trtllm.engine.config import EngineConfig
from saw_trtllm.errors import EngineError
from saw_trtllm.runtime.collectives import Collectives
from saw_trtllm.version import __version__


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
    # The config holds the checksums of all files, so that builds of one model are told apart too.
    text = f"{__version__} {config.model_dump_json()}"
    ours = np.frombuffer(hashlib.sha256(text.encode()).digest(), np.uint8)
    for rank, theirs in enumerate(collectives.all_gather(ours)):
        if not np.array_equal(theirs, ours):
            raise EngineError(
                f"rank {rank} has another build of the engine, or another release of saw_trtllm, than rank "
                f"{collectives.rank} with {folder}: copy one engine folder to all machines and install one release"
            )
