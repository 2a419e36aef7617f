"""What the runtime asks of a backend."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np

from saw_trtllm.engine.step import StepInputs
from saw_trtllm.runtime.host_cache import HostBlocks
from saw_trtllm.runtime.sampling import SamplingState


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
    top_logprobs : list of list of (int, float)
        The likeliest tokens of each sequence under the model, the likeliest first, and their log-probabilities: so many
        as its sampling parameters ask for. Empty where none asks.
    """

    token_ids: list[int]
    logprobs: list[float]
    logits: list[np.ndarray | None]
    top_logprobs: Sequence[list[tuple[int, float]]] = ()


class PendingStep(Protocol):
    """A step that has been launched."""

    def draw(self, sampling: Sequence[SamplingState | None]) -> None:
        """Say how the tokens of a step are chosen that was launched without; before its result, and the next launch.

        What that fails with its result raises, unless ranks are lost.
        """
        ...

    def result(self) -> StepOutput:
        """Wait for the step, and give what it computed or raise what it failed with. Called once."""
        ...


class FinishedStep:
    """A step that is computed at one go, as soon as its draws are known.

    Parameters
    ----------
    compute : callable
    sampling : sequence of SamplingState or None, optional
        Its draws; without, they come by :meth:`draw`.
    """

    def __init__(
        self,
        compute: Callable[[Sequence[SamplingState | None]], StepOutput],
        sampling: Sequence[SamplingState | None] | None,
    ) -> None:
        self._compute = compute
        if sampling is not None:
            self.draw(sampling)

    def draw(self, sampling: Sequence[SamplingState | None]) -> None:
        """Compute it."""
        self._output = self._compute(sampling)

    def result(self) -> StepOutput:
        """Give what was computed."""
        return self._output


class Executor(HostBlocks, Protocol):
    """Runs steps of an engine over a pool of ``num_blocks`` blocks. One thread calls it.

    Of an engine that is split over ranks each has an executor, of as many blocks as the others. They are called alike,
    in the same order, and all give the same.

    Steps take effect in the order of their launches, and their results are taken in that order. Where ``asynchronous``,
    the next step may be launched before the result of the last one is taken, never two: at most two are in flight.

    Any call of one whose ranks are other processes, of a step or a transfer in flight too, may raise
    :class:`saw_trtllm.errors.RankError`. Then nothing is in flight any more and the pools are empty; it goes on with
    the next launch.
    """

    num_blocks: int
    asynchronous: bool

    def launch(
        self, step: StepInputs, sampling: Sequence[SamplingState | None] | None, context_logits: Sequence[bool]
    ) -> PendingStep:
        """Begin to compute a step.

        Parameters
        ----------
        step : StepInputs
            B sequences. Its arrays are the caller's again once the result has been taken. Where the executor is
            asynchronous, an input id of ``-1 - j`` is the token that sequence j of the step launched just before draws.
        sampling : sequence of SamplingState or None, optional
            How to choose each sequence's next token; None for one that only fills the cache. To be read now: its tokens
            grow once earlier steps are done. A sequence with penalties has no token that the caller does not know.
            Where one of them depends on a token of the step in flight, all come later, by :meth:`PendingStep.draw`: the
            layers, which take most of a step's time, run meanwhile.
        context_logits : sequence of bool
            Which sequences want the logits of all their tokens.

        Raises
        ------
        Exception
            If the step cannot begin; then it has not taken place, and the one in flight is not harmed.
        """
        ...

    def shutdown(self) -> None:
        """Release what the executor holds. No step is in flight."""
        ...
