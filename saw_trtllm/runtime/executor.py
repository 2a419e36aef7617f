"""What the runtime asks of a backend."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np

from saw_trtllm.runtime.sampling import SamplingState
from saw_trtllm.runtime.step import StepInputs


@dataclass(frozen=True)
class StepOutput:
    """What a step gives.

    Attributes
    ----------
    token_ids : list of int
        The next token of each sequence; -1 where none was asked for.
    logprobs : list of float
        Its log-probability, where its sampling parameters ask for it; 0 elsewhere.
    logits : list of numpy.ndarray or None
        fp32 ``[n, vocab_size]`` of the sequences that asked for logits: of all their tokens of this step for those that
        want their prompt's, of the last one else.
    """

    token_ids: list[int]
    logprobs: list[float]
    logits: list[np.ndarray | None]


class Executor(Protocol):
    """Runs steps of an engine over a pool of ``num_blocks`` blocks. One thread calls it."""

    num_blocks: int

    def execute(
        self, step: StepInputs, sampling: Sequence[SamplingState | None], context_logits: Sequence[bool]
    ) -> StepOutput:
        """Compute a step.

        Parameters
        ----------
        step : StepInputs
            B sequences.
        sampling : sequence of SamplingState or None
            How to choose each sequence's next token; None for one that only fills the cache.
        context_logits : sequence of bool
            Which sequences want the logits of all their tokens.
        """
        ...

    def shutdown(self) -> None:
        """Release what the executor holds."""
        ...
