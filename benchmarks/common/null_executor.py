"""An executor that computes nothing, at once or at a given pace: what a runtime and a server cost, on any machine."""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

from saw_trtllm import LLM
from saw_trtllm.engine.step import StepInputs
from saw_trtllm.errors import ConfigError
from saw_trtllm.runtime.executor import StepOutput

#: Tokens that the executor gives in turn: letters, in the example's vocabulary.
_FIRST, _NUM = 70, 26


class Pace(NamedTuple):
    """How long a step takes: milliseconds for itself, for each of its sequences, and for each token of a prompt."""

    step: float = 0.0
    sequence: float = 0.0
    prompt_token: float = 0.0

    @classmethod
    def parse(cls, text: str) -> Pace:
        """Read ``STEP,SEQUENCE,PROMPT_TOKEN``.

        Raises
        ------
        ConfigError
            If it is not three numbers.
        """
        try:
            step, sequence, prompt_token = map(float, text.split(","))
            pace = cls(step, sequence, prompt_token)
        except ValueError:
            pace = cls(-1.0)
        if not all(0 <= ms < math.inf for ms in pace):
            raise ConfigError(
                f"--pace is {text!r}: give milliseconds of a step, a sequence and a prompt's token: 5,0.02,0.03"
            )
        return pace

    def seconds(self, step: StepInputs) -> float:
        """What a step takes."""
        count = len(step.last_token_ids)
        return (self.step + self.sequence * count + self.prompt_token * (len(step.input_ids) - count)) / 1e3


class _NullStep:
    def __init__(self, due: float) -> None:
        self._due = due

    def draw(self, sampling: Sequence[Any]) -> None:
        tokens = [-1 if state is None else _FIRST + state.draw % _NUM for state in sampling]
        self._output = StepOutput(tokens, [0.0] * len(tokens), [None] * len(tokens))

    def result(self) -> StepOutput:
        if (left := self._due - time.monotonic()) > 0:
            time.sleep(left)
        return self._output


class NullExecutor:
    """Gives each sequence its next letter; with a pace, as an engine beside the host does.

    Parameters
    ----------
    pace : Pace
    """

    num_blocks = 1 << 16
    num_host_blocks = 0

    def __init__(self, pace: Pace = Pace()) -> None:  # noqa: B008
        self._pace = pace
        self._due = 0.0
        self.asynchronous = any(pace)

    def launch(self, step: StepInputs, sampling: Sequence[Any] | None, *_: Any) -> _NullStep:
        """Begin a step."""
        if self.asynchronous:
            self._due = max(self._due, time.monotonic()) + self._pace.seconds(step)
        pending = _NullStep(self._due)
        if sampling is not None:
            pending.draw(sampling)
        return pending

    def shutdown(self) -> None:
        """Nothing is held."""


def open_null(folder: Path, pace: Pace = Pace()) -> LLM:  # noqa: B008
    """An engine whose steps cost nothing."""
    with patched(pace):
        return LLM(folder, verify=False)


def patched(pace: Pace) -> Any:
    """In this context, and from its ``start()`` on, every engine is one whose steps cost nothing."""
    return mock.patch("saw_trtllm.llm.open_executor", side_effect=lambda *_: NullExecutor(pace))
