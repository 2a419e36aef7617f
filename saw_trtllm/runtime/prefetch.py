"""What the host and the disk have of the requests that wait, brought back before they are scheduled."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from itertools import islice

from saw_trtllm.runtime.block_manager import BlockManager
from saw_trtllm.runtime.host_cache import HostCache
from saw_trtllm.runtime.sequence import Sequence

#: Waiting requests whose blocks are fetched from the host: enough that those that find room together share a step's
#: prefills, few enough that the calls of their copies take no longer than a step.
NUM_FETCHED_AHEAD = 16
#: Waiting requests whose blocks are read from the disk, which takes longer.
NUM_SOUGHT_AHEAD = 32


class Prefetch:
    """Holds blocks for those who wait, as far as free ones reach beside those who run.

    Parameters
    ----------
    blocks : BlockManager
    host : HostCache
    waiting : deque of Sequence
        The scheduler's own, which changes.
    open_table : callable
        Holds what the pool has of a sequence, until its table is closed.
    """

    def __init__(
        self,
        blocks: BlockManager,
        host: HostCache,
        waiting: deque[Sequence],
        open_table: Callable[[Sequence], object],
    ) -> None:
        self._blocks, self._host, self._waiting, self._open = blocks, host, waiting, open_table

    def ask(self, headroom: int) -> None:
        """Take in what has come, and ask for more for those who wait; so many free blocks are left to those who run."""
        self._host.poll()
        room = self._host.num_slots
        for sequence in islice(self._waiting, NUM_SOUGHT_AHEAD):
            room -= self._blocks.blocks_for(sequence.num_tokens)
            if room < 0:  # what is read for one must not make that of another go
                break
            if not sequence.table.sought:
                self._open(sequence)
                self._host.seek(sequence.table)
                self._blocks.close(sequence.table)
        spare = self._blocks.num_free - headroom
        for sequence in islice(self._waiting, NUM_FETCHED_AHEAD):
            table = sequence.table
            # Of those before it each must still find room, else what is held for the last would keep the first out.
            spare -= self._blocks.blocks_for(sequence.num_tokens) - len(table.fetched or ())
            if spare < 0:
                break
            if table.fetched is None:
                self._open(sequence)
                self._host.fetch(table, sequence.tokens(0, sequence.num_tokens), headroom)
                self._blocks.close(table)

    def let_one_go(self, num_kept: int) -> bool:
        """Free what is held for the last of the waiting, but for the first ``num_kept``; false if nothing is."""
        return any(self._host.let_go(s.table) for s in reversed(list(islice(self._waiting, num_kept, None))))

    def is_awaited(self, sequence: Sequence, num_missing: int, headroom: int, copying: bool) -> bool:
        """Whether a sequence must wait for blocks that are on their way.

        Parameters
        ----------
        sequence : Sequence
            Its table is open.
        num_missing : int
            Blocks that it lacks beside what is open.
        headroom : int
            Free blocks for those who run.
        copying : bool
            Whether rows of blocks are to be copied before the step that is being scheduled.
        """
        host, table = self._host, sequence.table
        if host.is_fetching(table):
            return True
        fits = num_missing + headroom <= self._blocks.num_free
        if fits and table.fetched is None:
            # There was no room yet for what the host has of it, or it was let go of and may be gone.
            host.seek(table)
            tokens = sequence.tokens(0, sequence.num_tokens)
            if copying and host.has_more(table, tokens):
                # Copies from the host begin before this step, and might take a block that it copies rows from.
                return True
            host.fetch(table, tokens, headroom)
            return host.is_fetching(table)
        if not fits and set(table.fetched or ()) - set(self._blocks.held(table)):
            # Of what is held for this one, whole chunks are open now; the rest may be what it lacks.
            host.let_go(table)
            table.fetched = []
        return False
