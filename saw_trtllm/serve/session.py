"""Ends a server with all its processes, and sees to it that this happens when the launcher dies too.

A server leads a session of its own, and every process that it starts stays in that session, also when its parent has
died. This module is a script as well, the guard, which is why it imports nothing but psutil.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import psutil

#: Seconds for what is left when either the leader or all the others have ended: no request is in flight then. Stubs
#: notice that their server has gone; Triton 2.51 waits in vain for an ensemble whose client left at the last response.
_REST_GRACE = 3.0

#: Seconds after which a process that even SIGKILL does not end, in a driver for one, is left to the kernel.
_KILL_PATIENCE = 3.0

_PR_SET_CHILD_SUBREAPER = 36


def alive(process: psutil.Process) -> bool:
    """Whether a process runs, or could. One whose main thread alone has ended is shown as a zombie, too."""
    try:
        return process.is_running() and (process.status() != psutil.STATUS_ZOMBIE or process.num_threads() > 1)
    except psutil.NoSuchProcess:
        return False


def members(leader: int) -> list[psutil.Process]:
    """The processes of a session that still run.

    Zombies that are this process's to reap, orphans that came to a subreaper, are reaped; the leader is not, since
    whoever started it waits for its exit code.
    """
    found = []
    # The leader first: once it is dead, its children are this process's and can be reaped.
    for pid in sorted(psutil.pids(), key=lambda pid: pid != leader):
        with contextlib.suppress(ProcessLookupError, psutil.NoSuchProcess):
            if os.getsid(pid) != leader:
                continue
            process = psutil.Process(pid)
            if alive(process):
                found.append(process)
            elif pid != leader:
                with contextlib.suppress(ChildProcessError):
                    os.waitpid(pid, os.WNOHANG)
    return found


def end(leader: int, shared_memory: str, grace: float, hurry: Callable[[], bool] = lambda: False) -> bool:
    """End a session: SIGTERM to its leader, and SIGKILL to whatever is left.

    Parameters
    ----------
    leader : int
        The session's id, and its leader's.
    shared_memory : str
        Beginning of the names of the session's files in ``/dev/shm``, which go last.
    grace : float
        Seconds between the two signals.
    hurry : callable
        Ends the grace when it gives True.

    Returns
    -------
    bool
        Whether the grace was long enough for what the processes were about.
    """
    deadline = time.monotonic() + grace
    left = members(leader)
    alone = len(left) == 1
    if grace and any(p.pid == leader for p in left):
        with contextlib.suppress(ProcessLookupError):
            os.kill(leader, signal.SIGTERM)
    while left and time.monotonic() < deadline and not hurry():
        if not alone and len({p.pid == leader for p in left}) == 1:
            alone, deadline = True, min(deadline, time.monotonic() + _REST_GRACE)
        time.sleep(0.05)
        left = members(leader)
    in_time = len({p.pid == leader for p in left}) < 2
    deadline = time.monotonic() + _KILL_PATIENCE
    while left and time.monotonic() < deadline:
        for process in left:
            with contextlib.suppress(psutil.NoSuchProcess):
                process.kill()
        time.sleep(0.02)
        left = members(leader)
    for file in Path("/dev/shm").glob(f"{shared_memory}*"):
        file.unlink(missing_ok=True)
    return in_time


def become_subreaper() -> None:
    """Let orphans of this process's descendants come to it, so that no zombie stays where process 1 reaps none."""
    ctypes.CDLL(None).prctl(_PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)


def start_guard(leader: int, shared_memory: str, grace: float) -> subprocess.Popen:
    """Start a process that ends the session once this process is gone, however that came.

    It waits for the end of its input, which nobody else holds.
    """
    return subprocess.Popen(
        [sys.executable, __file__, str(leader), shared_memory, str(grace)],
        stdin=subprocess.PIPE,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,  # Ctrl-C is not for it
    )


def _guard(leader: str, shared_memory: str, grace: str) -> None:
    sys.stdin.buffer.read()
    end(int(leader), shared_memory, float(grace))


if __name__ == "__main__":
    _guard(*sys.argv[1:])
