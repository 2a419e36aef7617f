"""Which sequences compute which tokens in the next step.

Decodes go first, then prefills that have begun, then new requests in the order in which they were queued. That order,
and no number that a sequence bears, decides who is preempted: those that run are kept in it, each step's decodes are
taken from its front, and what has to make room is taken from its back, up to where the two meet. What a sequence
computes never depends on the others, so neither does its result:

- A prompt's chunks end at multiples of ``prefill_chunk``, counted from the prompt's start. A chunk that does not fit
  into the step's budget waits for the next step; it is not cut.
- In a 4-bit cache a token that attends to a neighbour of its own chunk sees it unquantized, and one of an earlier chunk
  in 4 bits, so a token's rows depend a little on which step computed it. Where that must not show, reused prefixes are
  cut to whole chunks (``BlockManager``'s ``reuse_multiple``), generated tokens are found by nobody, and a preempted
  sequence replays them one by one, as it decoded them. Where it may, or in a cache that is exact, rows are
  interchangeable: all that was computed is found again, and a preempted sequence computes its tokens in prefills.

A step may be scheduled while the one before it is in flight. Then some sequences' last tokens are not known yet: they
are scheduled as if none of them ended the text. Nothing is preempted meanwhile, and what a sequence that is removed
meanwhile holds is freed when its part is done.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, field
from itertools import chain, islice

from saw_trtllm.engine.step import DECODE, PREFILL, RowCopy, StepSequence
from saw_trtllm.errors import RequestError
from saw_trtllm.runtime.block_manager import BlockManager, BlockTable
from saw_trtllm.runtime.host_cache import HostCache
from saw_trtllm.runtime.sampling_params import SamplingParams

#: Waiting requests whose blocks are fetched from the host: enough that the copies of the next ones go on while a step
#: runs, few enough that what comes back is not evicted before it is used.
NUM_FETCHED_AHEAD = 8


@dataclass(eq=False)
class Sequence:
    """A request on its way through the scheduler.

    Attributes
    ----------
    request_id : int
        Its name. It says nothing of its place in the queue.
    prompt, generated : list of int
    params : SamplingParams
    table : BlockTable
        Empty while waiting.
    num_computed : int
        Leading tokens whose rows are in the cache.
    num_reused : int
        Leading tokens that were found in the cache when the sequence was last admitted.
    cache_salt : str
        Only sequences of the same salt find each other's blocks.
    in_flight : Scheduled or None
        Its part of the step in flight.
    removed : bool
        Whether its blocks are to be freed once that is done.
    leader : Sequence or None
        One of the same prompt, queued before, whose blocks it waits for.
    """

    request_id: int
    prompt: list[int]
    params: SamplingParams
    generated: list[int] = field(default_factory=list)
    table: BlockTable = field(default_factory=BlockTable)
    num_computed: int = 0
    num_reused: int = 0
    cache_salt: str = ""
    in_flight: Scheduled | None = None
    removed: bool = False
    leader: Sequence | None = None

    @property
    def num_tokens(self) -> int:
        """Tokens known so far."""
        return len(self.prompt) + len(self.generated)

    @property
    def draws_its_last(self) -> bool:
        """Whether the step in flight draws the last token that it may have."""
        last = self.in_flight
        return last is not None and last.samples and last.num_drawn + 1 == self.params.max_tokens

    def tokens(self, start: int, end: int) -> list[int]:
        """Known tokens ``start .. end - 1``."""
        n = len(self.prompt)
        return (
            self.prompt[start:end] if end <= n else [*self.prompt[start:], *self.generated[max(start - n, 0) : end - n]]
        )


@dataclass(eq=False)
class Scheduled:
    """A sequence's part of a step.

    Attributes
    ----------
    sequence : Sequence
    inputs : StepSequence
        Its block table is the sequence's own, and grows with it.
    end : int
        Tokens of the sequence that are computed by then.
    samples : bool
        Whether its last token's logits choose the next token: whether these are all tokens so far.
    num_drawn : int
        Tokens of the text so far, known or not.
    index : int
        Its place in the step.
    """

    sequence: Sequence
    inputs: StepSequence
    end: int
    samples: bool
    num_drawn: int
    index: int = 0


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
        self.num_preemptions = 0
        self._max_batch_size = max_batch_size
        self._max_num_tokens = max_num_tokens
        self._prefill_chunk = prefill_chunk
        self._interchangeable_rows = interchangeable_rows
        self.host = host
        self._num_leaving = 0  # removed ones whose parts are in flight

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

    def add(self, sequence: Sequence) -> None:
        """Queue a sequence that :meth:`check` has let pass, at the end of the queue."""
        self.waiting.append(sequence)

    def schedule(self) -> list[Scheduled]:
        """Choose the next step's sequences, prefills first.

        Empty when there is nothing to do, or nothing before the step in flight is done.
        """
        self.copies = []
        if self.host is not None:
            self.host.poll()
            self._fetch()
        step = self._schedule()
        if self.host is not None:
            self.host.begin()
        return step

    def _schedule(self) -> list[Scheduled]:
        budget = self._max_num_tokens
        preemptions = self.num_preemptions
        parts = [self._next(s) for s in self.running if not s.draws_its_last]
        begun = {kind: [p for p in parts if p.inputs.kind == kind] for kind in (DECODE, PREFILL)}
        step: dict[int, list[Scheduled]] = {PREFILL: [], DECODE: []}
        for part in chain.from_iterable(begun.values()):
            sequence, inputs = part.sequence, part.inputs
            if not sequence.table.blocks:  # preempted for an earlier one
                continue
            if sequence.in_flight is not None and sequence.params.needs_last_token:
                return []  # its next choice depends on a token that nobody knows yet
            if len(inputs.token_ids) > budget:
                continue
            if not self._grow(sequence.table, part.end):
                if self._is_under_way():
                    return []
                if not self._make_room(part):
                    continue
            budget -= len(inputs.token_ids)
            step[inputs.kind].append(part)
        while self.waiting and len(self.running) < self._max_batch_size and preemptions == self.num_preemptions:
            admitted = self._admit(self.waiting[0], budget)
            if admitted is None:
                break
            self.waiting.popleft()
            budget -= len(admitted.inputs.token_ids)
            step[admitted.inputs.kind].append(admitted)
        chosen = step[PREFILL] + step[DECODE]
        _check_whole(chosen)
        return chosen

    def launched(self, step: list[Scheduled]) -> None:
        """Note that a step is in flight: the next one may be scheduled now."""
        for i, scheduled in enumerate(step):
            scheduled.index = i
            scheduled.sequence.in_flight = scheduled

    def advance(self, scheduled: Scheduled) -> None:
        """Note that a sequence's part of a step has been computed."""
        sequence = scheduled.sequence
        sequence.num_computed = scheduled.end
        findable, table = self._findable(sequence), sequence.table
        if table.digest is not None and findable // self.blocks.tokens_per_block > table.num_registered:
            self.blocks.register(table, sequence.tokens(0, findable))
        self.done(scheduled)

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

    def _findable(self, sequence: Sequence) -> int:
        """How many of the computed tokens others may find."""
        return sequence.num_computed if self._interchangeable_rows else min(sequence.num_computed, len(sequence.prompt))

    def _close(self, sequence: Sequence) -> None:
        if sequence.num_computed > sequence.num_reused:  # else rows that were to be copied may not have been
            self.blocks.register_tail(sequence.table, sequence.tokens(0, self._findable(sequence)))
        self.blocks.close(sequence.table)

    def _is_under_way(self) -> bool:
        return self._num_leaving > 0 or any(s.in_flight is not None for s in self.running)

    def _next(self, s: Sequence) -> Scheduled:
        """What the sequence computes next."""
        prompt, last = len(s.prompt), s.in_flight
        start, total, unknown = s.num_computed, prompt + len(s.generated), []
        if last is not None:
            start = last.end
            if last.samples:
                total, unknown = total + 1, [-1 - last.index]
        if start >= prompt and (total - start == 1 or not self._interchangeable_rows):
            kind, end = DECODE, start + 1
        else:
            kind, chunk_end = PREFILL, (start // self._prefill_chunk + 1) * self._prefill_chunk
            end = min(total if self._interchangeable_rows else prompt, chunk_end)
        samples = end == total
        tokens = unknown if unknown and start + 1 == total else s.tokens(start, end)
        return Scheduled(s, StepSequence(tokens, start, prompt, kind, s.table.blocks), end, samples, total - prompt)

    def _make_room(self, part: Scheduled) -> bool:
        """Blocks for the sequence's next tokens, from those that were queued last if need be."""
        while not self._grow(part.sequence.table, part.end):
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

    def _fetch(self) -> None:
        """Ask the host for blocks of those who wait, as far as free blocks reach beside those who run."""
        if self.host is None:
            return
        room = self.host.num_slots
        for sequence in islice(self.waiting, NUM_FETCHED_AHEAD):
            room -= self.blocks.blocks_for(sequence.num_tokens)
            if room < 0:  # what is read for one must not make that of another go
                break
            if not sequence.table.sought:
                self._open(sequence)
                self.host.seek(sequence.table)
                self.blocks.close(sequence.table)
        spare = self.blocks.num_free - len(self.running)
        for sequence in islice(self.waiting, NUM_FETCHED_AHEAD):
            table = sequence.table
            # Of those before it each must still find room, else what is held for the last would keep the first out.
            spare -= self.blocks.blocks_for(sequence.num_tokens) - len(table.fetched or ())
            if spare < 0:
                break
            if table.fetched is None:
                self._open(sequence)
                self.host.fetch(table, len(self.running))
                self.blocks.close(table)

    def _grow(self, table: BlockTable, num_tokens: int) -> bool:
        """Room for so many tokens, if need be in blocks that are held for those who wait longest yet."""
        while not self.blocks.grow(table, num_tokens):
            if not self._let_one_go(0):
                return False
        return True

    def _let_one_go(self, num_kept: int) -> bool:
        """Free what is held for the last of the waiting, but for the first ``num_kept``; false if nothing is."""
        if self.host is None:
            return False
        return any(self.host.let_go(s.table) for s in reversed(list(islice(self.waiting, num_kept, None))))

    def _open(self, sequence: Sequence) -> int:
        """Hold what the pool has of a sequence; how many tokens that is."""
        known = sequence.tokens(0, sequence.num_tokens if self._interchangeable_rows else len(sequence.prompt))
        reuse = not sequence.params.return_context_logits
        return self.blocks.open(sequence.table, known, reuse, sequence.cache_salt)

    def _admit(self, sequence: Sequence, budget: int) -> Scheduled | None:
        if self._waits_for_leader(sequence):
            return None
        table, reused = sequence.table, self._open(sequence)
        sequence.num_computed, sequence.num_reused = reused, reused
        part = self._next(sequence)
        missing = self.blocks.blocks_for(sequence.num_tokens) - len(table.blocks)
        # One free block for each running sequence, so that its next tokens do not preempt the newcomer at once.
        headroom = len(self.running)
        fetching = self.host is not None and self.host.is_fetching(table)
        while missing + headroom > self.blocks.num_free and self._let_one_go(1):
            pass
        if self.host is not None and not fetching:
            if missing + headroom <= self.blocks.num_free and table.fetched is None:
                # There was no room yet for what the host has of it, or it was let go of and may be gone.
                self.host.seek(table)
                self.host.fetch(table, headroom)
                fetching = self.host.is_fetching(table)
            elif missing + headroom > self.blocks.num_free and set(table.fetched or ()) - set(table.blocks):
                # Of what is held for this one, whole chunks are open now; the rest may be what it lacks.
                self.host.let_go(table)
                table.fetched = []
        if fetching or len(part.inputs.token_ids) > budget or missing + headroom > self.blocks.num_free:
            self.blocks.close(table)
            return None
        full = len(table.blocks)
        self.blocks.grow(table, sequence.num_tokens)
        if self.host is not None:
            self.host.let_go(table)
        if table.partial is not None:
            source, rows = table.partial
            self.copies.append(RowCopy(source, table.blocks[full], rows))
        self.running.append(sequence)
        return part


def _check_whole(step: list[Scheduled]) -> None:
    """Raise RuntimeError if a sequence was preempted for another one of its step: two would write to one block."""
    for part in step:
        if part.inputs.block_table is not part.sequence.table.blocks:
            raise RuntimeError(f"request {part.sequence.request_id} was preempted by the step that it is part of")
