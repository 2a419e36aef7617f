"""Ranks as plain processes of this machine."""

from __future__ import annotations

import os
import pickle
import signal
import subprocess
import sys
import threading
from collections.abc import Sequence

from saw_trtllm.errors import EngineError
from saw_trtllm.parallel.rank import RankSpec
from saw_trtllm.plugins.gpus import Driver


class LocalProcesses:
    """The ranks of a group on this machine. All see its GPUs, of which each takes the one of its number.

    See :class:`saw_trtllm.parallel.group.RankProcesses`.

    Parameters
    ----------
    size : int
        Ranks.
    needs_gpus : bool
        Whether each has a GPU of its own.
    ended : threading.Event
        Of no use here: there is room, or there is none.

    Raises
    ------
    EngineError
        If there are too few.
    """

    host: str | None = None
    #: What a process runs, with the rank's spec as its input.
    code = "import pickle, sys; from saw_trtllm.parallel.rank import run_rank; run_rank(pickle.load(sys.stdin.buffer))"

    def __init__(self, size: int, needs_gpus: bool, ended: threading.Event) -> None:
        if needs_gpus and (count := len(Driver.load().gpus)) < size:
            raise EngineError(
                f"the engine is split over {size} ranks, a GPU each, and this machine has {count}: build it anew with "
                "a smaller --tp_size, or start the ranks on several machines with Ray"
            )
        self._processes: list[subprocess.Popen[bytes]] = []

    def start(self, specs: Sequence[RankSpec]) -> None:
        """Start them with this Python, and nothing of the script that it runs."""
        path = os.pathsep.join(filter(None, sys.path))
        for spec in specs:
            environment = {**os.environ, "PYTHONPATH": path}
            # In a session of its own: Ctrl-C in a terminal is for the leader, which may only stop a text by it.
            process = subprocess.Popen(
                [sys.executable, "-c", self.code], stdin=subprocess.PIPE, env=environment, start_new_session=True
            )
            self._processes.append(process)
            with process.stdin as pipe:  # type: ignore[union-attr]
                pipe.write(pickle.dumps(spec))

    def failure(self) -> str | None:
        """The first that has ended."""
        for rank, process in enumerate(self._processes):
            if (code := process.poll()) is not None:
                how = f"signal {signal.Signals(-code).name}" if code < 0 else f"exit code {code}"
                return f"the process of rank {rank} has ended with {how}: see its log"
        return None

    def end(self) -> None:
        """Kill them."""
        for process in self._processes:
            process.kill()
        for process in self._processes:
            process.wait()
