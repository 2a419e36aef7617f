"""Collections of garbage in a process that serves."""

from __future__ import annotations

import gc


def set_start_aside() -> None:
    """Leave what there is now, modules and models above all, out of collections from here on.

    A full collection looks at all of it, about 40 ms in which no step begins and no piece is sent, though it lives as
    long as the process.
    """
    gc.collect()
    gc.freeze()
