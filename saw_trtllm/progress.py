"""Progress of a long command on stderr: a bar on a terminal, elsewhere a line now and then, as a log takes it."""

from __future__ import annotations

import contextlib
import sys
import threading
import time
from typing import Any, Protocol

from tqdm import tqdm

#: Seconds between two lines. What is done sooner prints none.
INTERVAL = 10.0

_LINE = "{desc}: {n_fmt}/{total_fmt} {unit}, {percentage:.0f}%, {elapsed} elapsed, {remaining} left"


class Progress(Protocol):
    """What counts a long command's steps, from its entry to its exit."""

    def update(self, n: int = 1) -> Any:
        """Note that so many more are done."""

    def __enter__(self) -> Progress: ...

    def __exit__(self, *_: Any) -> Any: ...


def progress(total: int, desc: str, unit: str, show: bool = True) -> Progress:
    """Count up to ``total``; without ``show`` nothing is written."""
    if show and not sys.stderr.isatty():
        return ProgressLines(total, desc, unit)
    return tqdm(total=total, desc=desc, unit=unit, disable=not show)


class ProgressLines:
    """tqdm's count as lines. A thread writes them, so that they come within a long step too."""

    def __init__(self, total: int, desc: str, unit: str) -> None:
        self._total, self._desc, self._unit = total, desc, unit
        self._count = 0
        self._num_lines = 0
        self._start = time.monotonic()
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._write_lines, name="saw-progress", daemon=True)

    def update(self, n: int = 1) -> None:
        """Note that so many more are done."""
        self._count += n

    def __enter__(self) -> ProgressLines:
        self._thread.start()
        return self

    def __exit__(self, *_: Any) -> None:
        self._ended.set()
        self._thread.join()
        if self._num_lines:  # a log that says how it began says how it ended
            self._write_line()

    def _write_lines(self) -> None:
        with contextlib.suppress(OSError):  # nobody reads stderr any more
            while not self._ended.wait(INTERVAL):
                self._write_line()

    def _write_line(self) -> None:
        elapsed = time.monotonic() - self._start
        line = tqdm.format_meter(
            self._count, self._total, elapsed, prefix=self._desc, unit=self._unit, bar_format=_LINE
        )
        self._num_lines += 1
        print(line, file=sys.stderr, flush=True)
