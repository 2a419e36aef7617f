"""What a server says on stdout."""

from __future__ import annotations

import contextlib


def say(line: str) -> None:
    """Print a line for whoever still reads: they may have waited for an earlier one alone, and the server goes on."""
    with contextlib.suppress(BrokenPipeError):
        print(line, flush=True)
