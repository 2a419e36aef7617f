"""A request as the scheduler sees it, and its part of a step."""

from __future__ import annotations

from dataclasses import dataclass, field

from saw_trtllm.engine.step import StepSequence
from saw_trtllm.runtime.block_table import BlockTable
from saw_trtllm.runtime.sampling_params import SamplingParams


@dataclass(eq=False, slots=True)
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
    spare : Scheduled or None
        Its part of the step before, which is over: its next decode is made of it.
    removed : bool
        Whether its blocks are to be freed once what is in flight is done.
    leader : Sequence or None
        One of the same prompt, queued before, whose blocks it waits for.
    max_tokens : int
        Of its text.
    needs_last_token : bool
        Whether its next token cannot be chosen before the last one is known; it may be computed up to there.
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
    spare: Scheduled | None = None
    removed: bool = False
    leader: Sequence | None = None
    max_tokens: int = field(init=False)
    needs_last_token: bool = field(init=False)

    def __post_init__(self) -> None:
        self.max_tokens = self.params.max_tokens
        self.needs_last_token = self.params.needs_last_token

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


@dataclass(eq=False, slots=True)
class Scheduled(StepSequence):
    """A sequence's part of a step. Its block table is the sequence's own, and grows with it.

    Attributes
    ----------
    sequence : Sequence
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
    end: int
    samples: bool
    num_drawn: int
    index: int = 0
