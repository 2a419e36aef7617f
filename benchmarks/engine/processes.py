"""Processes of this machine that are the ranks of a group, of which this one is the first."""

from __future__ import annotations

import multiprocessing
from collections.abc import Callable, Sequence
from multiprocessing.process import BaseProcess
from typing import Any

from saw_trtllm.runtime.collectives import Collectives, Rendezvous, join
from saw_trtllm.runtime.door import Address

#: Seconds that ranks may take to come, and to end.
SECONDS = 120.0


def start_ranks(
    size: int, follow: Callable[..., object], arguments: Sequence[tuple[Any, ...]]
) -> tuple[Collectives, list[BaseProcess]]:
    """Start the ranks from 1, each of which calls ``follow(collectives, *arguments)`` with its own of ``arguments``.

    Returns
    -------
    tuple of (Collectives, list of Process)
        The group as rank 0 sees it, and the others' processes.
    """
    context, processes = multiprocessing.get_context("spawn"), []
    with Rendezvous() as meeting:
        for rank, own in enumerate(arguments, start=1):
            process = context.Process(target=_be, args=(meeting.address, rank, size, follow, own), daemon=True)
            process.start()
            processes.append(process)
        return meeting.wait(size, SECONDS), processes


def _be(address: Address, rank: int, size: int, follow: Callable[..., object], arguments: tuple[Any, ...]) -> None:
    follow(join(address, rank, size, SECONDS), *arguments)
