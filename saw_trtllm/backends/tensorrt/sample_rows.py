"""What the sampling kernel reads of a step, packed on the host."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from saw_trtllm.ops.sample import BANNED, BY_LIKELIHOOD, BY_TOKEN, GREEDY, LISTED, ROW, UNSEEN
from saw_trtllm.runtime.sampling import SamplingState
from saw_trtllm.runtime.sampling_params import SamplingParams


class StagedRows:
    """The rows of a step. A sequence that draws as the one in its row did before costs only its number.

    Parameters
    ----------
    rows : numpy.ndarray
        :data:`ROW` ``[max_sequences]``, to be filled; all of it is valid after each :meth:`fill`.
    vocab_size : int
    """

    def __init__(self, rows: np.ndarray, vocab_size: int) -> None:
        self.rows = rows
        self._vocab_size = vocab_size
        self._params: list[SamplingParams | None] = [None] * len(rows)
        rows[:] = np.zeros((), ROW)

    def fill(self, sampling: Sequence[SamplingState | None]) -> None:
        """Describe a step's draws; sequences beyond them draw nothing. Lists and masks are left to the caller."""
        count = len(sampling)
        for i, state in enumerate(sampling):
            params = None if state is None else state.params
            if params is not self._params[i]:
                self.rows[i] = self._row(params)
                self._params[i] = params
        if any(params is not None for params in self._params[count:]):
            self.rows[count:] = np.zeros((), ROW)
            self._params[count:] = [None] * (len(self.rows) - count)
        self.rows["index"][:count] = [0 if state is None else state.draw for state in sampling]
        self.rows["num_listed"][:count] = 0
        self.rows["mask"][:count] = 0

    def _row(self, params: SamplingParams | None) -> tuple:
        if params is None:
            return (0,) * len(ROW.names or ())
        by_likelihood = params.top_k or params.top_p is not None
        draw = GREEDY if params.greedy else BY_LIKELIHOOD if by_likelihood else BY_TOKEN
        return (
            params.seed or 0,
            0,
            1.0 if params.temperature is None else params.temperature,
            1.0 if params.top_p is None else params.top_p,
            params.min_p or 0.0,
            params.repetition_penalty,
            params.presence_penalty,
            params.frequency_penalty,
            0,
            0,
            0,
            min(params.top_k or 0, self._vocab_size),
            draw,
            1 + params.top_logprobs if params.top_logprobs else params.logprobs,
        )


class TokenLists:
    """The listed tokens of sequences, counted on from step to step."""

    def __init__(self) -> None:
        self._counts: dict[int, _Counts] = {}

    def of(self, sampling: Sequence[SamplingState | None]) -> dict[int, np.ndarray]:
        """The list, :data:`LISTED` ``[n]``, of each sequence that has one, by its number in the step."""
        lists, kept = {}, {}
        for i, state in enumerate(sampling):
            if state is None:
                continue
            listed = None
            if state.params.penalizes or state.params.logit_bias:
                # By its text: the list is the sequence's own, and lives as long as it does.
                key = id(state.generated)
                counts = self._counts.get(key) or _Counts(state)
                kept[key] = counts
                listed = counts.listed()
            if state.banned:
                listed = _ban(listed, state.banned)
            if listed is not None and len(listed):
                lists[i] = listed
        self._counts = kept
        return lists


class _Counts:
    """How often each token of a text, and of its prompt where that matters, has come; and the biases."""

    def __init__(self, state: SamplingState) -> None:
        params = state.params
        self._text = state.generated  # held, so that no other list has its id
        self._penalizes = params.penalizes
        self._known = 0
        prompt = dict.fromkeys(state.prompt if params.repetition_penalty != 1.0 else ())
        bias = params.logit_bias or {}
        self._places = {token: i for i, token in enumerate(dict.fromkeys((*prompt, *bias)))}
        self._listed = np.zeros(2 * len(self._places) + 64, LISTED)
        self._listed["token"][: len(self._places)] = list(self._places)
        self._listed["count"][len(prompt) : len(self._places)] = UNSEEN
        for token, value in bias.items():
            self._listed["bias"][self._places[token]] = value

    def listed(self) -> np.ndarray:
        """The tokens so far: a view, to be copied."""
        for token in self._text[self._known :] if self._penalizes else ():
            place = self._places.setdefault(token, len(self._places))
            if place == len(self._listed):
                self._listed = np.concatenate([self._listed, np.zeros_like(self._listed)])
            self._listed["token"][place] = token
            self._listed["count"][place] = max(self._listed["count"][place], 0) + 1
        self._known = len(self._text)
        return self._listed[: len(self._places)]


def _ban(listed: np.ndarray | None, banned: Sequence[int]) -> np.ndarray:
    """A list with the banned tokens too. Each token stands in it once."""
    bans = np.zeros(len(banned), LISTED)
    bans["token"], bans["count"] = banned, BANNED
    return bans if listed is None else np.concatenate([listed[~np.isin(listed["token"], banned)], bans])
