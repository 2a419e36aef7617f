"""Which sequences compute which tokens in the next step.

Decodes go first, then prefills that have begun, then new requests in the order of their arrival. What a sequence
computes never depends on the others, so neither does its result:

- A prompt's chunks end at multiples of ``prefill_chunk``, counted from the prompt's start. A chunk that does not fit
  into the step's budget waits for the next step; it is not cut.
- In a 4-bit cache a token that attends to a neighbour of its own chunk sees it unquantized, and one of an earlier chunk
  in 4 bits. Reused prefixes are therefore cut to whole chunks (``BlockManager``'s ``reuse_multiple``), and a preempted
  sequence replays its generated tokens one by one, as it decoded them. A cache that is exact needs neither.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, field

from saw_trtllm.errors import RequestError
from saw_trtllm.runtime.block_manager import BlockManager, BlockTable
from saw_trtllm.runtime.sampling_params import SamplingParams
from saw_trtllm.runtime.step import DECODE, PREFILL, StepSequence


@dataclass(eq=False)
class Sequence:
    """A request on its way through the scheduler.

    Attributes
    ----------
    request_id : int
        Ascending by arrival.
    prompt, generated : list of int
    params : SamplingParams
    table : BlockTable
        Empty while waiting.
    num_computed : int
        Leading tokens whose rows are in the cache.
    num_reused : int
        Leading tokens that were found in the cache when the sequence was last admitted.
    """

    request_id: int
    prompt: list[int]
    params: SamplingParams
    generated: list[int] = field(default_factory=list)
    table: BlockTable = field(default_factory=BlockTable)
    num_computed: int = 0
    num_reused: int = 0

    @property
    def num_tokens(self) -> int:
        """Tokens known so far."""
        return len(self.prompt) + len(self.generated)

    def tokens(self, start: int, end: int) -> list[int]:
        """Known tokens ``start .. end - 1``."""
        n = len(self.prompt)
        return (
            self.prompt[start:end] if end <= n else [*self.prompt[start:], *self.generated[max(start - n, 0) : end - n]]
        )


@dataclass(frozen=True)
class Scheduled:
    """A sequence's part of a step, and whether its last token's logits choose the next token."""

    sequence: Sequence
    inputs: StepSequence

    @property
    def samples(self) -> bool:
        """Whether all known tokens are computed by this step."""
        return self.inputs.start + len(self.inputs.token_ids) == self.sequence.num_tokens


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
    exact_cache : bool
        Whether rows come back from the cache as they went in.
    """

    def __init__(
        self, blocks: BlockManager, max_batch_size: int, max_num_tokens: int, prefill_chunk: int, exact_cache: bool
    ) -> None:
        self.blocks = blocks
        self.waiting: deque[Sequence] = deque()
        self.running: list[Sequence] = []
        self.num_preemptions = 0
        self._max_batch_size = max_batch_size
        self._max_num_tokens = max_num_tokens
        self._prefill_chunk = prefill_chunk
        self._exact_cache = exact_cache

    @property
    def has_work(self) -> bool:
        """Whether any sequence is unfinished."""
        return bool(self.waiting or self.running)

    def check(self, sequence: Sequence) -> None:
        """Refuse what could never run. Safe to call from any thread.

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
        """Queue a sequence that :meth:`check` has let pass."""
        self.waiting.append(sequence)

    def schedule(self) -> list[Scheduled]:
        """Choose the next step's sequences, prefills first. Empty when there is nothing to do."""
        step: list[Scheduled] = []
        budget = self._max_num_tokens
        preemptions = self.num_preemptions
        for sequence in sorted(self.running, key=lambda s: (self._kind(s) == PREFILL, s.request_id)):
            if not sequence.table.blocks:  # preempted for an earlier one
                continue
            if self._chunk(sequence) <= budget and self._make_room(sequence):
                budget -= self._take(sequence, step)
        while self.waiting and len(self.running) < self._max_batch_size and preemptions == self.num_preemptions:
            if not self._admit(self.waiting[0], budget):
                break
            budget -= self._take(self.waiting.popleft(), step)
        return sorted(step, key=lambda s: s.inputs.kind)

    def advance(self, scheduled: Scheduled) -> None:
        """Note that a sequence's part of a step has been computed."""
        sequence = scheduled.sequence
        sequence.num_computed += len(scheduled.inputs.token_ids)
        self.blocks.register(sequence.table, min(sequence.num_computed, len(sequence.prompt)))

    def remove(self, sequence: Sequence) -> None:
        """Forget a sequence, finished or not, and free its blocks."""
        if sequence in self.running:
            self.running.remove(sequence)
            self.blocks.close(sequence.table)
        elif sequence in self.waiting:
            self.waiting.remove(sequence)

    def _kind(self, s: Sequence) -> int:
        replay = self._exact_cache and s.num_tokens - s.num_computed > 1
        return PREFILL if s.num_computed < len(s.prompt) or replay else DECODE

    def _chunk(self, s: Sequence) -> int:
        """How many tokens the sequence computes next."""
        if self._kind(s) == DECODE:
            return 1
        end = s.num_tokens if self._exact_cache else len(s.prompt)
        return min(end, (s.num_computed // self._prefill_chunk + 1) * self._prefill_chunk) - s.num_computed

    def _take(self, s: Sequence, step: list[Scheduled]) -> int:
        count = self._chunk(s)
        tokens = s.tokens(s.num_computed, s.num_computed + count)
        inputs = StepSequence(tokens, s.num_computed, len(s.prompt), self._kind(s), s.table.blocks)
        step.append(Scheduled(s, inputs))
        return count

    def _make_room(self, sequence: Sequence) -> bool:
        """Blocks for the sequence's next tokens, from the last-arrived others if need be."""
        while not self.blocks.grow(sequence.table, sequence.num_computed + self._chunk(sequence)):
            victim = max(self.running, key=lambda s: s.request_id)
            self._preempt(victim)
            if victim is sequence:
                return False
        return True

    def _preempt(self, sequence: Sequence) -> None:
        self.running.remove(sequence)
        self.blocks.close(sequence.table)
        sequence.num_computed = 0
        self.waiting.appendleft(sequence)
        self.num_preemptions += 1

    def _admit(self, sequence: Sequence, budget: int) -> bool:
        reuse = not sequence.params.return_context_logits
        table, reused = sequence.table, self.blocks.open(sequence.table, sequence.prompt, reuse)
        sequence.num_computed, sequence.num_reused = reused, reused
        missing = self.blocks.blocks_for(sequence.num_tokens) - len(table.blocks)
        # One free block for each running sequence, so that its next tokens do not preempt the newcomer at once.
        headroom = len(self.running)
        if self._chunk(sequence) > budget or missing + headroom > self.blocks.num_free:
            self.blocks.close(table)
            return False
        self.blocks.grow(table, sequence.num_tokens)
        self.running.append(sequence)
        return True
