"""Which sequences compute which tokens in the next step.

Decodes go first, then prefills that have begun, then new requests in the order in which they were queued. That order,
and no number that a sequence bears, decides who is preempted: those that run are kept in it, each step's decodes are
taken from its front, and what has to make room is taken from its back, up to where the two meet. What a sequence
computes never depends on the others, so neither does its result:

- A prompt's chunks end at multiples of ``prefill_chunk``, counted from the prompt's start. A chunk that does not fit
  into the step's budget waits for the next step; it is not cut.
- In a 4-bit cache a token that attends to a neighbour of its own chunk sees it unquantized, and one of an earlier chunk
  in 4 bits, and a GPU's products round by the number of their rows, so a token's rows depend a little on which step
  computed it. Where that must not show, reused prefixes are cut to whole chunks (``BlockManager``'s
  ``reuse_multiple``), generated tokens are found by nobody, and a preempted sequence replays them one by one, as it
  decoded them. Where it may, rows are interchangeable: all that was computed is found again, and a preempted sequence
  computes its tokens in prefills.

A step may be scheduled while the one before it is in flight. Then some sequences' last tokens are not known yet: they
are scheduled as if none of them ended the text. Nothing is preempted meanwhile, and what a sequence that is removed
meanwhile holds is freed when its part is done.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable
from itertools import chain

from saw_trtllm.engine.step import DECODE, PREFILL, RowCopy
from saw_trtllm.errors import RequestError
from saw_trtllm.runtime.block_manager import BlockManager
from saw_trtllm.runtime.block_table import BlockTable
from saw_trtllm.runtime.host_cache import HostCache
from saw_trtllm.runtime.prefetch import Prefetch
from saw_trtllm.runtime.sequence import Scheduled, Sequence


class Scheduler:
    """Continuous batching over a :class:`BlockManager`.

    Parameters
    ----------
    blocks : BlockManager
    max_batch_size : int
        Sequences in a step.
    max_num_tokens : int
        Tokens in a step.
    prefill_chunk : int
        Tokens of a chunk; ``max_num_tokens - max_batch_size`` at most, so that a chunk fits beside any decodes.
    interchangeable_rows : bool
        Whether a token's rows may come from any step that computed it: see above.
    host : HostCache, optional
        Blocks that have left the pool. What it holds of a request is fetched while the request waits.

    Attributes
    ----------
    copies : list of RowCopy
        Rows that are to be copied, in this order, before the step that was scheduled last.
    draws_late : bool
        Whether a draw of the step that was scheduled last depends on a token of the one in flight.
    """

    def __init__(
        self,
        blocks: BlockManager,
        max_batch_size: int,
        max_num_tokens: int,
        prefill_chunk: int,
        interchangeable_rows: bool,
        host: HostCache | None = None,
    ) -> None:
        self.blocks = blocks
        self.waiting: deque[Sequence] = deque()
        self.running: list[Sequence] = []
        self.copies: list[RowCopy] = []
        self.draws_late = False
        self.num_preemptions = 0
        self._max_batch_size = max_batch_size
        self._max_num_tokens = max_num_tokens
        self._prefill_chunk = prefill_chunk
        self._interchangeable_rows = interchangeable_rows
        self.host = host
        self._prefetch = None if host is None else Prefetch(blocks, host, self.waiting, self._open)
        self._num_leaving = 0  # removed ones whose parts are in flight

    @property
    def _headroom(self) -> int:
        """Free blocks for those that run, so that their next tokens do not preempt a newcomer at once."""
        return len(self.running) * self.blocks.num_tables

    @property
    def has_work(self) -> bool:
        """Whether any sequence is unfinished."""
        return bool(self.waiting or self.running)

    def check(self, sequence: Sequence) -> None:
        """Reject what could never run. Safe to call from any thread.

        Raises
        ------
        RequestError
            If the whole pool could not hold the sequence.
        """
        most = len(sequence.prompt) + sequence.params.max_tokens
        needed = self.blocks.blocks_for(most)
        if needed > self.blocks.num_blocks:
            raise RequestError(
                f"the prompt and max_tokens come to {most} tokens, {needed} blocks, and the KV cache has "
                f"{self.blocks.num_blocks}: shorten them or give the cache more memory"
            )

    def prepare(self, sequence: Sequence) -> None:
        """Work out what finds a prompt's blocks, so that no step waits for it. Safe to call from any thread."""
        if not sequence.params.needs_context_logits:
            self.blocks.name(sequence.table, sequence.prompt, sequence.cache_salt)

    def add(self, sequence: Sequence) -> None:
        """Queue a sequence that :meth:`check` has let pass, at the end of the queue."""
        self.waiting.append(sequence)

    def schedule(self) -> list[Scheduled]:
        """Choose the next step's sequences, prefills first.

        Empty when there is nothing to do, or nothing before the step in flight is done.
        """
        self.copies, self.draws_late = [], False
        if self._prefetch is not None:
            self._prefetch.ask(self._headroom)
        step = self._schedule()
        if self.host is not None:
            self.host.begin()
        return step

    def _schedule(self) -> list[Scheduled]:
        budget = self._max_num_tokens
        preemptions = self.num_preemptions
        step: dict[int, list[Scheduled]] = {PREFILL: [], DECODE: []}
        decodes, prefills, growing = self._begun()
        rest: Iterable[Scheduled] = chain(decodes, prefills)
        if len(decodes) <= budget and all(self.blocks.grow(part.sequence.table, part.end) for part in growing):
            step[DECODE], budget, rest = decodes, budget - len(decodes), prefills  # as it mostly is
        for part in rest:
            if not part.sequence.table.blocks:  # preempted for an earlier one
                continue
            if len(part.token_ids) > budget:
                continue
            if not self._grow(part.sequence.table, part.end):
                if self._is_under_way():
                    return []
                made = self._make_room(part)
                # Blocks that a prefill with windows was promised may be on their way to the host yet: then a decode of
                # a later sequence has given way.
                kept = [p for p in step[DECODE] if p.sequence.table.blocks]
                budget, step[DECODE] = budget + len(step[DECODE]) - len(kept), kept
                if not made:
                    continue
            budget -= len(part.token_ids)
            step[part.kind].append(part)
        while self.waiting and len(self.running) < self._max_batch_size and preemptions == self.num_preemptions:
            admitted = self._admit(self.waiting[0], budget)
            if admitted is None:
                break
            self.waiting.popleft()
            budget -= len(admitted.token_ids)
            step[admitted.kind].append(admitted)
        chosen = step[PREFILL] + step[DECODE]
        if preemptions != self.num_preemptions:
            _check_whole(chosen)
        return chosen

    def _begun(self) -> tuple[list[Scheduled], list[Scheduled], list[Scheduled]]:
        """What those that run compute next: decodes, prefills, and the decodes that need another block.

        It is in each step's way, for every sequence: hence no function is called for a decode that follows another, and
        nothing made.
        """
        decodes: list[Scheduled] = []
        prefills: list[Scheduled] = []
        growing: list[Scheduled] = []
        size = self.blocks.tokens_per_entry
        for s in self.running:
            last = s.in_flight
            if last is None or not last.samples:
                part = self._next(s)
                if part.kind != DECODE:
                    prefills.append(part)
                    continue
            elif last.num_drawn + 1 == s.max_tokens:  # its last token
                continue
            else:
                if s.needs_last_token:
                    self.draws_late = True
                start = last.end
                spare = s.spare
                if spare is None:
                    token, prompt_len, blocks = [-1 - last.index], last.prompt_len, last.block_table
                    part = Scheduled(token, start, prompt_len, DECODE, blocks, s, start + 1, True, last.num_drawn + 1)
                else:
                    s.spare = None
                    part = spare
                    part.token_ids = [-1 - last.index]
                    part.start = start
                    part.end = start + 1
                    part.num_drawn = last.num_drawn + 1
            decodes.append(part)
            if part.end > len(part.block_table) * size:
                growing.append(part)
        return decodes, prefills, growing

    def launched(self, step: list[Scheduled]) -> None:
        """Note that a step is in flight: the next one may be scheduled now."""
        for i, scheduled in enumerate(step):
            scheduled.index = i
            scheduled.sequence.in_flight = scheduled

    def advance(self, parts: Iterable[Scheduled]) -> None:
        """Note that a step's parts have been computed. With the next step they are no longer the caller's."""
        for part in parts:
            sequence, end = part.sequence, part.end
            if sequence.removed:
                self.done(part)
                continue
            sequence.num_computed = end
            if sequence.in_flight is part:
                sequence.in_flight = None
            elif part.samples and part.kind == DECODE:
                sequence.spare = part
            if end >= sequence.table.due:  # mostly not so: a block is filled now and then
                self._settle(sequence)

    def _settle(self, sequence: Sequence) -> None:
        """Let others find the blocks that a sequence has filled, and give back those that it reads no more."""
        table, size, findable = sequence.table, self.blocks.tokens_per_block, self._findable(sequence)
        start = table.num_registered * size
        if table.digest is not None and findable >= start + size:
            self.blocks.register(table, sequence.tokens(start, findable), start)
        if sequence.num_computed >= table.next_drop:  # what is in flight or comes begins there
            self.blocks.drop(table, sequence.num_computed)
        filled = (table.num_registered + 1) * size
        registers = table.digest is not None and (self._interchangeable_rows or filled <= len(sequence.prompt))
        table.due = min(table.next_drop, filled) if registers else table.next_drop

    def done(self, scheduled: Scheduled) -> None:
        """Note that a sequence's part of a step is over, whatever became of it."""
        sequence = scheduled.sequence
        if sequence.in_flight is scheduled:
            sequence.in_flight = None
            if sequence.removed:
                self._num_leaving -= 1
                self._close(sequence)

    def remove(self, sequence: Sequence) -> None:
        """Forget a sequence, finished or not, and free its blocks as soon as nothing writes to them."""
        if sequence in self.running:
            self.running.remove(sequence)
            if sequence.in_flight is None:
                self._close(sequence)
            else:
                sequence.removed = True
                self._num_leaving += 1
        elif sequence in self.waiting:
            self.waiting.remove(sequence)
            if self.host is not None:
                self.host.let_go(sequence.table)

    def reset(self, in_flight: Iterable[Scheduled]) -> list[Sequence]:
        """Begin anew with an empty pool: all that it held is lost, and what is in flight does not come.

        Those that ran wait again, before the others, and compute their tokens anew once they are admitted.

        Parameters
        ----------
        in_flight : iterable of Scheduled
            All parts of the steps in flight.

        Returns
        -------
        list of Sequence
            Those of them that had computed anything, or were about to.
        """
        self.blocks.forget()
        if self.host is not None:
            self.host.reset()
            for sequence in self.waiting:
                self.host.let_go(sequence.table)
        begun = [s for s in self.running if s.generated or s.in_flight is not None or s.num_computed > s.num_reused]
        for part in in_flight:
            part.sequence.num_computed = part.sequence.num_reused = 0  # nobody is to find its rows
            self.done(part)
        for sequence in reversed(self.running):
            sequence.num_computed = sequence.num_reused = 0
            self._close(sequence)
        self.waiting.extendleft(reversed(self.running))
        self.running.clear()
        return begun

    def _findable(self, sequence: Sequence) -> int:
        """How many of the computed tokens others may find."""
        return sequence.num_computed if self._interchangeable_rows else min(sequence.num_computed, len(sequence.prompt))

    def _close(self, sequence: Sequence) -> None:
        if sequence.num_computed > sequence.num_reused:  # else rows that were to be copied may not have been
            self.blocks.register_tail(sequence.table, sequence.tokens(0, self._findable(sequence)))
        self.blocks.close(sequence.table)
        sequence.spare = None  # its blocks are others'

    def _is_under_way(self) -> bool:
        return self._num_leaving > 0 or any(s.in_flight is not None for s in self.running)

    def _next(self, s: Sequence) -> Scheduled:
        """What a sequence computes next, whose last token is known or not drawn yet."""
        prompt, last = len(s.prompt), s.in_flight
        start, total = s.num_computed if last is None else last.end, prompt + len(s.generated)
        if start >= prompt and (total - start == 1 or not self._interchangeable_rows):
            kind, end = DECODE, start + 1
        else:
            kind, chunk_end = PREFILL, (start // self._prefill_chunk + 1) * self._prefill_chunk
            end = min(total if self._interchangeable_rows else prompt, chunk_end)
        tokens = s.tokens(start, end)
        return Scheduled(tokens, start, prompt, kind, s.table.blocks, s, end, end == total, total - prompt)

    def _make_room(self, part: Scheduled) -> bool:
        """Blocks for the sequence's next tokens, from those that were queued last if need be."""
        while not self._grow(part.sequence.table, part.end):
            if self.host is not None and self.host.is_storing:
                self.host.wait()  # a block on its way to the host is free sooner than a sequence is computed anew
                continue
            victim = self.running[-1]
            self._preempt(victim)
            if victim is part.sequence:
                return False
        return True

    def _preempt(self, sequence: Sequence) -> None:
        self.running.remove(sequence)
        self._close(sequence)
        sequence.num_computed = 0
        self.waiting.appendleft(sequence)
        self.num_preemptions += 1

    def _waits_for_leader(self, sequence: Sequence) -> bool:
        """Whether another computes whole chunks of the same prompt now, which can then be shared."""
        leader, prompt = sequence.leader, len(sequence.prompt)
        return leader in self.running and leader.num_computed < prompt and self.blocks.can_share(prompt)

    def _grow(self, table: BlockTable, num_tokens: int) -> bool:
        """Room for so many tokens, if need be in blocks that are held for those who wait longest yet."""
        while not self.blocks.grow(table, num_tokens):
            if not self._let_one_go(0):
                return False
        return True

    def _let_one_go(self, num_kept: int) -> bool:
        return self._prefetch is not None and self._prefetch.let_one_go(num_kept)

    def _open(self, sequence: Sequence) -> int:
        """Hold what the pool has of a sequence; how many tokens that is."""
        known = sequence.tokens(0, sequence.num_tokens if self._interchangeable_rows else len(sequence.prompt))
        reuse = not sequence.params.needs_context_logits
        return self.blocks.open(sequence.table, known, reuse, sequence.cache_salt)

    def _admit(self, sequence: Sequence, budget: int) -> Scheduled | None:
        if self._waits_for_leader(sequence):
            return None
        table, reused = sequence.table, self._open(sequence)
        sequence.num_computed, sequence.num_reused = reused, reused
        part = self._next(sequence)
        missing, headroom = self.blocks.missing(table, sequence.num_tokens), self._headroom
        while missing + headroom > self.blocks.num_free and self._let_one_go(1):
            pass
        awaits = self._prefetch is not None and self._prefetch.is_awaited(
            sequence, missing, headroom, bool(self.copies)
        )
        if awaits or len(part.token_ids) > budget or missing + headroom > self.blocks.num_free:
            self.blocks.close(table)
            return None
        self.copies += self.blocks.admit(table, sequence.num_tokens, part.end)
        if self.host is not None:
            self.host.let_go(table)
        self.running.append(sequence)
        return part


def _check_whole(step: list[Scheduled]) -> None:
    """Raise RuntimeError if a sequence was preempted for another one of its step: two would write to one block."""
    for part in step:
        if part.block_table is not part.sequence.table.blocks:
            raise RuntimeError(f"request {part.sequence.request_id} was preempted by the step that it is part of")
