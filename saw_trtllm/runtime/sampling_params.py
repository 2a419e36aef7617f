"""What a request asks of the sampler, in the words of TensorRT-LLM's LLM API."""

from __future__ import annotations

import math
import numbers
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from saw_trtllm.errors import RequestError

_MAX_SEED = 2**64 - 1
_NUMBERS = dict.fromkeys(("max_tokens", "min_tokens", "top_k", "seed", "end_id"), numbers.Integral) | dict.fromkeys(
    ("temperature", "top_p", "repetition_penalty", "presence_penalty", "frequency_penalty"), numbers.Real
)
_OPTIONAL = ("temperature", "top_k", "top_p", "seed", "end_id")


@dataclass(frozen=True)
class SamplingParams:
    """How to choose tokens, and when to stop.

    Without ``temperature``, ``top_k`` and ``top_p`` the likeliest token is taken; so it is with ``top_k=1``,
    ``top_p=0`` or ``temperature=0``.

    Parameters
    ----------
    max_tokens : int
        Tokens to generate at most.
    min_tokens : int
        Tokens before which neither the end token nor a stop string ends the text.
    temperature : float, optional
        Divides the logits; 1 if sampling was asked for otherwise.
    top_k : int, optional
        Choose among so many; 0 is all.
    top_p : float, optional
        Choose among the likeliest that hold this share of the probability.
    seed : int, optional
        The same logits and the same seed give the same text, whatever else runs; 0 by default.
    stop : str or list of str, optional
        Strings that end the text.
    stop_token_ids : list of int, optional
        Tokens that end the text, beside the end token.
    stop_token_sequences : list of list of int, optional
        Runs of tokens that end the text (TensorRT-LLM's ``stop_words_list``).
    repetition_penalty : float
        Divides the positive logits, and multiplies the negative ones, of tokens in prompt and text.
    presence_penalty, frequency_penalty : float
        Subtracted from the logits of tokens in the text: once, and times their count.
    end_id : int, optional
        The end token; by default the tokenizer's. -1 is none.
    ignore_eos : bool
        Generate on after the end token.
    include_stop_str_in_output : bool
        Whether the text keeps the stop string.
    return_context_logits, return_generation_logits : bool
        Give the prompt's logits, and those of each generated token.
    logprobs : bool
        Give the log-probability of each generated token.

    Raises
    ------
    RequestError
        If a value is outside of its range.
    """

    max_tokens: int = 32
    min_tokens: int = 0
    temperature: float | None = None
    top_k: int | None = None
    top_p: float | None = None
    seed: int | None = None
    stop: str | Sequence[str] | None = None
    stop_token_ids: Sequence[int] | None = None
    stop_token_sequences: Sequence[Sequence[int]] | None = None
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    end_id: int | None = None
    ignore_eos: bool = False
    include_stop_str_in_output: bool = False
    return_context_logits: bool = False
    return_generation_logits: bool = False
    logprobs: bool = False

    def __post_init__(self) -> None:
        for name, kind in _NUMBERS.items():
            value = getattr(self, name)
            valid = isinstance(value, kind) and not isinstance(value, bool) and math.isfinite(value)
            needed = "a whole number" if kind is numbers.Integral else "a finite number"
            self._need(valid or (value is None and name in _OPTIONAL), name, needed)
        self._need(self.max_tokens >= 1, "max_tokens", "at least 1")
        self._need(0 <= self.min_tokens <= self.max_tokens, "min_tokens", f"from 0 to max_tokens ({self.max_tokens})")
        self._need(self.temperature is None or self.temperature >= 0, "temperature", "at least 0")
        self._need(self.top_k is None or self.top_k >= 0, "top_k", "at least 0")
        self._need(self.top_p is None or 0 <= self.top_p <= 1, "top_p", "from 0 to 1")
        self._need(self.repetition_penalty > 0, "repetition_penalty", "above 0")
        self._need(self.seed is None or 0 <= self.seed <= _MAX_SEED, "seed", "from 0 to 2**64 - 1")
        self._check_stops()

    def _check_stops(self) -> None:
        strings = (self.stop,) if isinstance(self.stop, str) else self.stop or ()
        self._need(_are(strings, _is_string), "stop", "a string or strings, none of them empty")
        self._need(_are(self.stop_token_ids or (), _is_token), "stop_token_ids", "token ids")
        runs = self.stop_token_sequences or ()
        self._need(_are(runs, _is_run), "stop_token_sequences", "lists of token ids, none of them empty")

    def _need(self, valid: bool, name: str, needed: str) -> None:
        if not valid:
            raise RequestError(f"{name} is {getattr(self, name)!r}: it must be {needed}")

    @property
    def stop_strings(self) -> tuple[str, ...]:
        """``stop`` as a tuple."""
        if self.stop is None:
            return ()
        return (self.stop,) if isinstance(self.stop, str) else tuple(self.stop)

    @property
    def greedy(self) -> bool:
        """Whether the likeliest token is always taken."""
        unset = self.temperature is None and self.top_k is None and self.top_p is None
        return unset or self.temperature == 0 or self.top_k == 1 or self.top_p == 0

    @property
    def penalizes(self) -> bool:
        """Whether the choice of a token depends on the tokens before it beyond the logits."""
        return self.repetition_penalty != 1.0 or bool(self.presence_penalty or self.frequency_penalty)


def _are(values: Any, test: Callable[[Any], bool]) -> bool:
    return isinstance(values, Iterable) and all(map(test, values))


def _is_string(value: Any) -> bool:
    return isinstance(value, str) and value != ""


def _is_token(value: Any) -> bool:
    return isinstance(value, numbers.Integral) and not isinstance(value, bool)


def _is_run(value: Any) -> bool:
    return _are(value, _is_token) and len(value) > 0
