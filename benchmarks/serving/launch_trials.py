"""Ends, stops and kills ``saw-triton --launch`` and what it has started, again and again, and counts what went wrong.

    python -m benchmarks.serving.launch_trials --engine_dir engine --tries 50

A try is well if the command ends with the exit code that belongs to the case, and if 15 s after the signal no process
and no shared-memory region is left. For the streams, the engine needs texts of more than 10 s (``--max_seq_len``).
"""

from __future__ import annotations

import argparse
import json
import os
import random
import re
import secrets
import signal
import subprocess
import sys
import tempfile
import threading
import time
import urllib.request
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import psutil

from benchmarks.common.ports import free_ports
from saw_trtllm.engine.config import EngineConfig
from saw_trtllm.serve.installation import STUB
from saw_trtllm.serve.session import alive

#: Seconds in which everything must be gone.
LIMIT = 15.0

#: Names a try's processes: all of them inherit it.
MARK = "SAW_LAUNCH_TRIAL"

STREAMS = 16


class Launch:
    """``saw-triton --launch`` in a process of its own.

    Parameters
    ----------
    engine_dir, folder : Path
        The engine, and where the model repository goes.
    restart : int
    """

    def __init__(self, engine_dir: Path, folder: Path, restart: int = 0) -> None:
        ports = free_ports(3)
        self.url, self.grpc = f"http://127.0.0.1:{ports[0]}", f"127.0.0.1:{ports[1]}"
        self._seen: set[psutil.Process] = set()
        self._mark = secrets.token_hex(8)
        self._max_tokens = EngineConfig.load(engine_dir).build_config.max_seq_len - 16
        command = [sys.executable, "-m", "saw_trtllm.cli.triton", "--launch", "--engine_dir", engine_dir]
        command += ["--model_repo", folder / "repo", "--restart", restart, "--log_level", "info"]
        for name, port in zip(("http_port", "grpc_port", "metrics_port"), ports, strict=True):
            command += [f"--{name}", port]
        self.log = folder / "stderr"
        with self.log.open("w") as log:
            self.process = subprocess.Popen(
                list(map(str, command)),
                stdout=subprocess.PIPE,
                stderr=log,
                text=True,
                env={**os.environ, MARK: self._mark},
            )

    def __enter__(self) -> Launch:
        return self

    def __exit__(self, *_: object) -> None:
        self.clean()

    def wait_ready(self) -> None:
        """Wait for the line that says so, the next one after a restart."""
        line = self.process.stdout.readline()
        if not line.startswith("ready: "):
            raise RuntimeError(f"the server did not become ready:\n{self.log.read_text()[-2000:]}")

    def generate(self, max_tokens: int) -> None:
        """Stream a text to its end."""
        body = {"text_input": "def main():", "max_tokens": max_tokens, "end_id": -1, "stream": True}
        request = urllib.request.Request(
            f"{self.url}/v2/models/ensemble/generate_stream", json.dumps(body).encode(), method="POST"
        )
        with urllib.request.urlopen(request, timeout=120) as response:
            for _ in response:
                pass

    def stream(self) -> None:
        """Begin texts that take long."""

        def run() -> None:
            with suppress(Exception):  # it is cut off
                self.generate(self._max_tokens)

        for _ in range(STREAMS):
            threading.Thread(target=run, daemon=True).start()
        time.sleep(1)

    def processes(self) -> list[psutil.Process]:
        """All that this launch has started, and itself, while they are there; as zombies, too, if seen alive before."""
        for process in psutil.process_iter():
            with suppress(psutil.Error):
                if process.environ().get(MARK) == self._mark:
                    self._seen.add(process)
        return [process for process in self._seen if process.is_running()]

    def find(self, name: str) -> psutil.Process:
        """A running process of a program, any one of several."""
        return random.choice([p for p in self.processes() if alive(p) and Path(p.cmdline()[0]).name == name])

    def regions(self) -> list[Path]:
        """Its files in ``/dev/shm``."""
        prefixes = re.findall(r"shm-region-prefix-name=(\w+)", self.log.read_text())
        return [file for prefix in prefixes for file in Path("/dev/shm").glob(f"{prefix}*")]

    def left(self) -> str | None:
        """What of it is still there."""
        processes, regions = self.processes(), self.regions()
        if not processes and not regions:
            return None
        return f"{len(regions)} regions and the processes {processes}"

    def end(self, number: int | None, code: int) -> float:
        """Send a signal, if any, and see that all is gone; returns the seconds that took."""
        self.processes()
        start = time.monotonic()
        if number is not None:
            self.process.send_signal(number)
        while (self.process.poll() is None or self.left()) and time.monotonic() - start < LIMIT:
            time.sleep(0.05)
        if self.process.poll() is None:
            raise RuntimeError(f"it still ran after {LIMIT:.0f} s")
        if left := self.left():
            raise RuntimeError(f"it left {left}")
        if self.process.returncode != code:
            raise RuntimeError(f"its exit code was {self.process.returncode}, not {code}")
        return time.monotonic() - start

    def clean(self) -> None:
        """Kill whatever is left of a try that went wrong."""
        for process in self.processes():
            with suppress(psutil.Error):
                process.kill()
        self.process.wait()
        self.process.stdout.close()
        for file in self.regions():
            file.unlink(missing_ok=True)


def in_a_stream(number: int) -> Callable[[Path, Path], float]:
    """A signal while texts grow that take longer than the grace."""

    def run(engine_dir: Path, folder: Path) -> float:
        with Launch(engine_dir, folder) as launch:
            launch.wait_ready()
            launch.stream()
            return launch.end(number, 0)

    return run


def in_the_start(number: int) -> Callable[[Path, Path], float]:
    """A signal at any moment of the start, from when the command takes signals."""

    def run(engine_dir: Path, folder: Path) -> float:
        with Launch(engine_dir, folder) as launch:
            while "starting " not in launch.log.read_text():
                time.sleep(0.01)
            time.sleep(random.uniform(0, 4))
            return launch.end(number, 0)

    return run


def stopped_stub(engine_dir: Path, folder: Path) -> float:
    """SIGTERM while one of the models' processes is stopped."""
    with Launch(engine_dir, folder) as launch:
        launch.wait_ready()
        launch.find(STUB).suspend()
        return launch.end(signal.SIGTERM, 0)


def killed(name: str) -> Callable[[Path, Path], float]:
    """A process that is killed: the server starts again once, and then ends with code 1."""

    def run(engine_dir: Path, folder: Path) -> float:
        with Launch(engine_dir, folder, restart=1) as launch:
            launch.wait_ready()
            launch.find(name).kill()
            launch.wait_ready()
            launch.generate(4)
            launch.find(name).kill()
            return launch.end(None, 1)

    return run


def killed_launcher(engine_dir: Path, folder: Path) -> float:
    """The command itself is killed while texts grow."""
    with Launch(engine_dir, folder) as launch:
        launch.wait_ready()
        launch.stream()
        return launch.end(signal.SIGKILL, -signal.SIGKILL)


CASES: dict[str, Callable[[Path, Path], float]] = {
    "sigterm_in_a_stream": in_a_stream(signal.SIGTERM),
    "sigint_in_a_stream": in_a_stream(signal.SIGINT),
    "sigterm_in_the_start": in_the_start(signal.SIGTERM),
    "sigint_in_the_start": in_the_start(signal.SIGINT),
    "stopped_stub": stopped_stub,
    "killed_stub": killed(STUB),
    "killed_server": killed("tritonserver"),
    "killed_launcher": killed_launcher,
}


def main() -> int:
    """Run the command."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--engine_dir", type=Path, required=True, metavar="DIR")
    parser.add_argument("--tries", type=int, default=50, metavar="N", help="of each case (default: %(default)s)")
    parser.add_argument("--case", choices=CASES, nargs="+", default=list(CASES))
    args = parser.parse_args()
    times: dict[str, list[float]] = {name: [] for name in args.case}
    for n in range(1, args.tries + 1):
        for name in args.case:
            with tempfile.TemporaryDirectory() as folder:
                try:
                    times[name].append(CASES[name](args.engine_dir, Path(folder)))
                except Exception as e:
                    # A machine that is busy with other work takes long over everything.
                    load = f"load {os.getloadavg()[0]:.0f} on {os.cpu_count()} cores"
                    print(f"{name} {n} ({load}): {e}", file=sys.stderr, flush=True)
        counts = ", ".join(f"{name} {len(seconds)}" for name, seconds in times.items())
        print(f"of {n}: {counts}", file=sys.stderr, flush=True)
    for name, seconds in times.items():
        slowest = f", gone after {max(seconds):.1f} s at most" if seconds else ""
        print(f"{name:<22}{len(seconds)} of {args.tries}{slowest}")
    return 0 if all(len(seconds) == args.tries for seconds in times.values()) else 1


if __name__ == "__main__":
    sys.exit(main())
