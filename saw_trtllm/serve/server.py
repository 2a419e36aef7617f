"""Starts a tritonserver, waits until a request goes through it, sees whether it is well, and stops it."""

from __future__ import annotations

import contextlib
import logging
import os
import secrets
import signal
import subprocess
import time
import urllib.request
from collections.abc import Callable, Mapping, Sequence
from http.client import HTTPException
from pathlib import Path

import psutil

from saw_trtllm.errors import EngineError
from saw_trtllm.serve import session
from saw_trtllm.serve.canary import Canary
from saw_trtllm.serve.installation import EXIT_TIMEOUT, STUB, Installation
from saw_trtllm.serve.log import BUSY, ServerLog
from saw_trtllm.serve.ports import Ports

logger = logging.getLogger(__name__)

#: Log levels at which a start is to be watched; at the others only its outcome counts.
_LOUD = ("info", "verbose", "debug")

#: Seconds between two looks at a server.
_TICK = 0.1


class BusyStartError(EngineError):
    """Triton has given up a start because the machine is too busy: the server and its models are not at fault."""


def _never() -> bool:
    return False


class Server:
    """A tritonserver that this process has started.

    Its processes end with :meth:`stop`, and also when this process dies.

    Parameters
    ----------
    installation : Installation
    repository : Path
    ports : Ports
    log_level : str
        One of the commands' log levels. The log goes to stderr, and to a file beside the repository.
    flags : sequence of str
        Further flags of tritonserver.
    canary_timeout : float
        Seconds without an answer or a token after which the server counts as stuck; 0 is never.

    Raises
    ------
    ConfigError
        If a port is in use, or the log cannot be written.
    """

    def __init__(
        self,
        installation: Installation,
        repository: Path,
        ports: Ports,
        log_level: str = "warning",
        flags: Sequence[str] = (),
        canary_timeout: float = 120.0,
    ) -> None:
        ports.check()
        self._ports = ports
        self._loud = log_level in _LOUD
        self._ready = self._loaded = False
        self._stubs: dict[str, psutil.Process] = {}
        self._log = ServerLog(repository.with_name(f"{repository.name}.{ports.http}.log"))
        self._canary = Canary(self.endpoints["HTTP"], self.endpoints["metrics"], canary_timeout)
        # A name of its own, so that what a crash leaves in /dev/shm is known to be this server's.
        self._shared_memory = f"saw_triton_{secrets.token_hex(6)}_"
        command = installation.command(repository, ports, log_level, flags)
        command.append(f"--backend-config=python,shm-region-prefix-name={self._shared_memory}")
        logger.info("starting %s", " ".join(command))
        with self._log.open() as log:
            # In a session of its own, Ctrl-C reaches only this process, which then stops the server in good order.
            self._process = subprocess.Popen(
                command,
                env=installation.environment(),
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=log,
                start_new_session=True,
            )
        self._guard = session.start_guard(self._process.pid, self._shared_memory, EXIT_TIMEOUT)

    def wait_ready(self, stopped: Callable[[], bool] = _never, timeout: float = 600.0) -> bool:
        """Wait until all models are loaded and have answered a first request.

        Parameters
        ----------
        stopped : callable
            Ends the wait when it gives True.
        timeout : float
            Seconds.

        Returns
        -------
        bool
            False if ``stopped`` ended the wait.

        Raises
        ------
        BusyStartError
            If Triton gives up because the machine is too busy.
        EngineError
            If the server ends instead, fails at the request, or takes too long.
        """
        url = f"{self.endpoints['HTTP']}/v2/health/ready"
        opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))  # never through a proxy
        deadline = time.monotonic() + timeout
        while not stopped():
            if (failure := self.failure()) is not None:
                raise self._start_failure(failure)
            if time.monotonic() > deadline:
                raise EngineError(f"tritonserver was not ready within {timeout:.0f} s: its log is {self._log.path}")
            if self._canary.answered:
                self._ready = True
                return True
            if not self._loaded:
                # Connections are rejected while the server starts; it says 400 while it loads: both are OSErrors.
                with contextlib.suppress(OSError, HTTPException), opener.open(url, timeout=5):
                    self._loaded, self._stubs = True, self._find_stubs()
                    self._canary.start(deadline - time.monotonic())
            time.sleep(_TICK)
        return False

    def watch(self, stopped: Callable[[], bool] = _never) -> str | None:
        """Stay with a server that is ready.

        Parameters
        ----------
        stopped : callable
            Ends the watch when it gives True.

        Returns
        -------
        str or None
            What went wrong with the server, as a sentence; None if ``stopped`` ended the watch.
        """
        while not stopped():
            if (failure := self.failure()) is not None:
                return f"tritonserver {failure}: its log is {self._log.path}"
            time.sleep(_TICK)
        return None

    def failure(self) -> str | None:
        """Why the server is unfit, in words that follow "tritonserver "; None while it is well."""
        if self._ready or self._loud:
            self._log.follow()
        code = self.poll()
        if code is not None:
            return f"ended by itself with {_exit_name(code)}"
        for model, stub in self._stubs.items():
            # Triton never replaces a model's process, and still says that it is ready.
            if not session.alive(stub):
                return f"has lost the process of its model {model}"
        return self._canary.failure

    def poll(self) -> int | None:
        """The exit code, or None while the server runs."""
        return self._process.poll()

    def stop(self, hurry: Callable[[], bool] = _never) -> None:
        """End the server and wait until all its processes have ended.

        Parameters
        ----------
        hurry : callable
            Ends the wait for requests in flight when it gives True.
        """
        self._canary.stop()
        # Only a server that is well has requests that it could finish.
        grace = EXIT_TIMEOUT if self._ready and self.failure() is None else 0
        in_time = session.end(self._process.pid, self._shared_memory, grace, hurry)
        if grace and not in_time:
            logger.warning("what still ran after the grace of %d s was cut off", grace)
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._process.wait(_TICK)
        self._guard.kill()
        self._guard.wait()
        if self._guard.stdin is not None:
            self._guard.stdin.close()
        if self._ready or self._loud:
            self._log.follow()
        self._log.close()

    def __enter__(self) -> Server:
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    @property
    def endpoints(self) -> Mapping[str, str]:
        """Where clients find the server."""
        host = "127.0.0.1" if self._ports.host == "0.0.0.0" else self._ports.host
        return {
            "gRPC": f"{host}:{self._ports.grpc}",
            "HTTP": f"http://{host}:{self._ports.http}",
            "metrics": f"http://{host}:{self._ports.metrics}/metrics",
        }

    def _find_stubs(self) -> dict[str, psutil.Process]:
        """The process of each model: the stub is called with the path ``.../MODEL/VERSION/model.py``."""
        stubs = {}
        for process in session.members(self._process.pid):
            with contextlib.suppress(psutil.NoSuchProcess):
                command = process.cmdline()
                if os.path.basename(command[0]) == STUB:
                    stubs[Path(command[1]).parts[-3]] = process
        return stubs

    def _start_failure(self, failure: str) -> EngineError:
        code, cause = self.poll(), self._log.cause()
        if code is not None:
            failure = f"ended before it was ready: {cause or _exit_name(code)}"
        elif cause is not None:
            failure = f"{failure}: {cause}"
        kind = BusyStartError if cause == BUSY else EngineError
        return kind(f"tritonserver {failure} (its log: {self._log.path})")


def _exit_name(code: int) -> str:
    return signal.Signals(-code).name if code < 0 else f"exit code {code}"
