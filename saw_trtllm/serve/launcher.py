"""Keeps a tritonserver running until a signal comes."""

from __future__ import annotations

import logging
import signal
import sys
import time
from collections.abc import Callable

from saw_trtllm.errors import EngineError
from saw_trtllm.serve import session
from saw_trtllm.serve.ready import say
from saw_trtllm.serve.server import BusyStartError, Server

logger = logging.getLogger(__name__)

#: Seconds after which a run counts as a good one, and earlier failures are forgotten.
_GOOD_RUN = 600.0
#: Starts in a row that Triton may give up because the machine is busy, beside the failures of a server.
_BUSY_STARTS = 3


class Signals:
    """Counts SIGINT and SIGTERM: the first asks for an end, another one for a fast end.

    A handler runs in the middle of whatever the main thread does, so that it must take no lock; an Event's are ones.
    """

    def __init__(self) -> None:
        self._count = 0
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, self._handle)

    def _handle(self, *_: object) -> None:
        self._count += 1

    def stopped(self) -> bool:
        """Whether an end is asked for."""
        return self._count > 0

    def hurried(self) -> bool:
        """Whether it is to come at once."""
        return self._count > 1


def launch(start: Callable[[], Server], restart: int) -> int:
    """Run a server until SIGINT or SIGTERM.

    Parameters
    ----------
    start : callable
        Starts a server.
    restart : int
        How often in a row to start it again after it has failed. A start that Triton gives up because the machine is
        busy is tried again beside that, a few times.

    Returns
    -------
    int
        The exit code: 0 after a signal, 1 after a failure.

    Raises
    ------
    SawError
        If the server cannot be started in the first place.
    """
    signals = Signals()
    session.become_subreaper()
    failures = busy_starts = 0
    while True:
        began = time.monotonic()
        server = start()
        try:
            if server.wait_ready(signals.stopped):
                busy_starts = 0
                endpoints = ", ".join(f"{name} {where}" for name, where in server.endpoints.items())
                say(f"ready: {endpoints}")
            failure = server.watch(signals.stopped)
        except BusyStartError as e:
            busy_starts += 1
            failure = str(e)
            if busy_starts > _BUSY_STARTS and not failures:
                raise EngineError(f"{failure}, {busy_starts} times: start it when the machine is less busy") from e
        except EngineError as e:
            if not failures:
                raise
            busy_starts, failure = 0, str(e)
        finally:
            server.stop(signals.hurried)
        if failure is None or signals.stopped():
            return 0
        if 0 < busy_starts <= _BUSY_STARTS:
            logger.warning("%s: the machine is busy; trying again, %d of %d", failure, busy_starts, _BUSY_STARTS)
            continue
        failures = 1 if time.monotonic() - began > _GOOD_RUN else failures + 1
        if failures > restart:
            print(f"error: {failure}", file=sys.stderr)
            return 1
        logger.warning("%s; starting it again, %d of %d", failure, failures, restart)
