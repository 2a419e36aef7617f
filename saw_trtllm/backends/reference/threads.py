"""How many of PyTorch's threads compute a call of a step: one, or all of them if the call is a large product.

Threads that share a call meet at its end, and to wake one takes as long as most calls of a step do. The number may show
in a product's last bits, so that it follows from the call's shape, and from how many threads there were when the
executor was opened: a thread that first uses PyTorch while another computes a step would take that one's number for its
own.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager

import torch


class _Step(threading.local):
    #: Threads of a large product; 0 outside a step.
    num_threads = 0


_step = _Step()


@contextmanager
def one_thread(num_threads: int) -> Iterator[None]:
    """What this thread computes meanwhile is a step: one thread computes it, but for :func:`all_threads`.

    Parameters
    ----------
    num_threads : int
        Those of a large product, and of what this thread computes after the step.
    """
    _step.num_threads = num_threads
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(num_threads)
        _step.num_threads = 0


@contextmanager
def all_threads() -> Iterator[None]:
    """Let all threads compute a large product of a step; outside one they do anyway."""
    num_threads = torch.get_num_threads()
    torch.set_num_threads(_step.num_threads or num_threads)
    try:
        yield
    finally:
        torch.set_num_threads(num_threads)


def thread_counts() -> tuple[int, int]:
    """Threads of a call, and of a large product in a step: calls of one shape have one of each."""
    return torch.get_num_threads(), _step.num_threads
