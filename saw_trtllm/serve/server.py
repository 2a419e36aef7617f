"""Starts a tritonserver, waits until it is ready, and stops it."""

from __future__ import annotations

import contextlib
import logging
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
import urllib.request
from collections import deque
from collections.abc import Mapping
from pathlib import Path

from saw_trtllm.errors import EngineError
from saw_trtllm.serve.installation import EXIT_TIMEOUT, Installation
from saw_trtllm.serve.ports import Ports

logger = logging.getLogger(__name__)

#: What Triton complains about on a machine without a GPU, though nothing is missing.
_NO_GPU_COMPLAINTS = re.compile(
    r"CudaDriverHelper has not been|unable to create stream|initialize NVML|DCGM unable|pinned system memory"
)


class Server:
    """A tritonserver that this process has started.

    Parameters
    ----------
    installation : Installation
    repository : Path
    ports : Ports
    log_level : str
        One of the commands' log levels. The log goes to stderr.

    Raises
    ------
    ConfigError
        If a port is in use.
    """

    def __init__(self, installation: Installation, repository: Path, ports: Ports, log_level: str = "warning") -> None:
        ports.check()
        self._ports = ports
        self._failures: deque[str] = deque(maxlen=20)
        self._quiet_gpu = not Path("/dev/nvidiactl").exists()
        command = installation.command(repository, ports, log_level)
        logger.info("starting %s", " ".join(command))
        # In a session of its own, Ctrl-C reaches only this process, which then stops the server in good order. Should
        # this process be killed, util-linux's setpriv has the kernel stop the server.
        follow = ["setpriv", "--pdeathsig", "TERM"] if shutil.which("setpriv") else []
        self._process = subprocess.Popen(
            [*follow, *command],
            env=installation.environment(),
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
            errors="replace",
            start_new_session=True,
        )
        self._reader = threading.Thread(target=self._read_log, name="saw-triton-log", daemon=True)
        self._reader.start()

    def wait_ready(self, stop: threading.Event | None = None, timeout: float = 600.0) -> bool:
        """Wait until all models are loaded.

        Parameters
        ----------
        stop : threading.Event, optional
            Ends the wait when set.
        timeout : float
            Seconds.

        Returns
        -------
        bool
            False if ``stop`` ended the wait.

        Raises
        ------
        EngineError
            If the server ends instead, or takes too long.
        """
        stop = stop or threading.Event()
        url = f"{self.endpoints['HTTP']}/v2/health/ready"
        opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))  # never through a proxy
        deadline = time.monotonic() + timeout
        while not stop.wait(0.1):
            if self.poll() is not None:
                self._reader.join()
                raise EngineError(f"tritonserver ended before it was ready: {self._why()}")
            if time.monotonic() > deadline:
                raise EngineError(f"tritonserver was not ready within {timeout:.0f} s: --log_level info shows more")
            # Refused while the server starts, 400 while it loads: both are OSErrors.
            with contextlib.suppress(OSError), opener.open(url, timeout=5):
                return True
        return False

    def poll(self) -> int | None:
        """The exit code, or None while the server runs."""
        return self._process.poll()

    def stop(self) -> None:
        """End the server and wait until it has ended."""
        self._process.terminate()
        try:
            self._process.wait(EXIT_TIMEOUT + 20)
        except subprocess.TimeoutExpired:
            logger.warning("tritonserver does not end: killing it")
            os.killpg(self._process.pid, signal.SIGKILL)
            self._process.wait()
        self._reader.join()
        self._process.stderr.close()

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

    def _read_log(self) -> None:
        for line in self._process.stderr:
            if self._quiet_gpu and _NO_GPU_COMPLAINTS.search(line):
                continue
            if "failed to load" in line or line.startswith("error:"):
                self._failures.append(line)
            sys.stderr.write(line)
            sys.stderr.flush()

    def _why(self) -> str:
        """The first failure that Triton logged, in short."""
        if not self._failures:
            return f"its exit code was {self._process.returncode}, and --log_level info shows more"
        message = re.search(r"TritonModelException: (.*?)(?:\"|\\n|$)", self._failures[0])
        return message[1].strip() if message else self._failures[0].strip()
