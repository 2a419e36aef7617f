"""What a request asks of the sampler, in the words of TensorRT-LLM's LLM API."""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any, NamedTuple

import numpy as np

from saw_trtllm.errors import RequestError
from saw_trtllm.runtime.guided_decoding import GuidedDecodingParams
from saw_trtllm.runtime.keywords import check_keywords, is_number, is_text, shown

#: Likeliest tokens of a place that a request may ask for.
MAX_TOP_LOGPROBS = 100

_LARGEST = sys.float_info.max


class _Range(NamedTuple):
    """What a number may be; ``words`` says it."""

    low: float
    high: float
    words: str
    whole: bool = False
    optional: bool = False


#: The penalties' ranges keep the logits of any model finite in fp32, on the CPU as on the GPU: 16-bit logits end at
#: 65504 or are those of a sane model in 32, and a text of 2**31 tokens takes 2e12 off one.
_RANGES = {
    "max_tokens": _Range(1, math.inf, "a whole number of at least 1", whole=True),
    "min_tokens": _Range(0, math.inf, "a whole number of at least 0", whole=True),
    "temperature": _Range(0, _LARGEST, "a finite number of at least 0", optional=True),
    "top_k": _Range(0, math.inf, "a whole number of at least 0", whole=True, optional=True),
    "top_p": _Range(0, 1, "a number from 0 to 1", optional=True),
    "min_p": _Range(0, 1, "a number from 0 to 1", optional=True),
    "n": _Range(1, 128, "a whole number from 1 to 128", whole=True),
    "top_logprobs": _Range(0, MAX_TOP_LOGPROBS, f"a whole number from 0 to {MAX_TOP_LOGPROBS}", whole=True),
    "seed": _Range(0, 2**64 - 1, "a whole number from 0 to 2**64 - 1", whole=True, optional=True),
    "repetition_penalty": _Range(1e-3, 1e3, "a number from 0.001 to 1000"),
    "presence_penalty": _Range(-1e3, 1e3, "a number from -1000 to 1000"),
    "frequency_penalty": _Range(-1e3, 1e3, "a number from -1000 to 1000"),
    "end_id": _Range(-math.inf, math.inf, "a whole number, the id of a token or -1", whole=True, optional=True),
}
_SWITCHES = (
    "ignore_eos",
    "include_stop_str_in_output",
    "return_context_logits",
    "return_generation_logits",
    "logprobs",
    "prompt_logprobs",
)
#: Of each kind of stops: how many a request may have, and their bytes or tokens in all. What finds them is built for
#: the request, in a few milliseconds.
MAX_STOPS, MAX_STOP_SIZE = 1024, 16384

_NO_BEAMS = "there is no beam search; leave it out"
_ADVICE = {
    "best_of": "ask for n texts with logprobs, and take the best",
    **dict.fromkeys(("use_beam_search", "beam_width", "length_penalty", "early_stopping"), _NO_BEAMS),
    "max_new_tokens": "write max_tokens",
    "skip_special_tokens": "leave it out; texts never hold special tokens",
}


@dataclass(frozen=True)
class SamplingParams:
    """How to choose tokens, and when to stop.

    Without ``temperature``, ``top_k``, ``top_p`` and ``min_p`` the likeliest token is taken; so it is with ``top_k=1``,
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
    min_p : float, optional
        Choose among those of at least this share of the likeliest one's probability.
    seed : int, optional
        The same logits and the same seed give the same text, whatever else runs; 0 by default. Of ``n`` texts each has
        the next one.
    guided_decoding : GuidedDecodingParams, optional
        What the text must be: JSON of a schema, or what a regular expression or a grammar allows. It excludes what
        would take tokens away: ``min_tokens``, ``ignore_eos`` and whatever begins with ``bad``.
    n : int
        Texts for the prompt, 1 to 128. Whole chunks of the prompt are computed once.
    stop : str or list of str, optional
        Strings that end the text, the first in its bytes. They may hold special tokens, which the text does not show.
    stop_token_ids : list of int, optional
        Tokens that end the text, beside the end token.
    stop_token_sequences : list of list of int, optional
        Runs of tokens that end the text (TensorRT-LLM's ``stop_words_list``). Of each kind of stops there may be
        1024, of 16384 bytes or tokens in all.
    repetition_penalty : float
        Divides the positive logits, and multiplies the negative ones, of tokens in prompt and text; 0.001 to 1000.
    presence_penalty, frequency_penalty : float
        Subtracted from the logits of tokens in the text: once, and times their count; -1000 to 1000.
    logit_bias : dict of int to float, optional
        Added to the logits of tokens, before the penalties; -100 to 100.
    bad : str or list of str, optional
        Words that the text must not hold, at its beginning or within; a word of several tokens loses its last one.
    bad_token_ids : list of int, optional
        Tokens that the text must not hold.
    bad_token_sequences : list of list of int, optional
        Runs of tokens that the text must not hold (TensorRT-LLM's ``bad_words_list``); each loses its last one.
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
    prompt_logprobs : bool
        Give the log-probability of each token of the prompt; as the prompt's logits do, it needs an engine built with
        ``--gather_context_logits``.
    top_logprobs : int
        Give those of so many of the likeliest tokens in each place too; 0 to 100.

    Raises
    ------
    RequestError
        If a value is outside of its range, or a name is not one of these.
    """

    max_tokens: int = 32
    min_tokens: int = 0
    temperature: float | None = None
    top_k: int | None = None
    top_p: float | None = None
    min_p: float | None = None
    seed: int | None = None
    stop: str | Sequence[str] | None = None
    stop_token_ids: Sequence[int] | None = None
    stop_token_sequences: Sequence[Sequence[int]] | None = None
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    logit_bias: Mapping[int, float] | None = None
    bad: str | Sequence[str] | None = None
    bad_token_ids: Sequence[int] | None = None
    bad_token_sequences: Sequence[Sequence[int]] | None = None
    end_id: int | None = None
    ignore_eos: bool = False
    include_stop_str_in_output: bool = False
    return_context_logits: bool = False
    return_generation_logits: bool = False
    logprobs: bool = False
    prompt_logprobs: bool = False
    top_logprobs: int = 0
    guided_decoding: GuidedDecodingParams | None = None
    n: int = 1

    def __new__(cls, *_: Any, **named: Any) -> SamplingParams:
        """Reject the names of arguments that it does not have."""
        check_keywords(cls.__name__, named, [f.name for f in fields(cls)], RequestError, _ADVICE)
        return super().__new__(cls)

    def __post_init__(self) -> None:
        for name, limits in _RANGES.items():
            value = getattr(self, name)
            if value is None and limits.optional:
                continue
            # NumPy compares in its number's own type, which a limit may overflow.
            number = value.item() if isinstance(value, np.generic) else value
            valid = is_number(value, limits.whole) and limits.low <= number <= limits.high
            self._need(valid, name, limits.words)
        self._need(self.min_tokens <= self.max_tokens, "min_tokens", f"at most max_tokens, {shown(self.max_tokens)}")
        for name in _SWITCHES:
            needed = "True or False"
            if name == "logprobs":
                needed += ", and top_logprobs says how many more of each place"
            self._need(isinstance(getattr(self, name), (bool, np.bool_)), name, needed)
        guided = self.guided_decoding
        self._need(isinstance(guided, GuidedDecodingParams | None), "guided_decoding", "GuidedDecodingParams(...)")
        if guided and (self.bans or self.ignore_eos):
            raise RequestError(
                "guided_decoding says which tokens may come: leave out min_tokens, bad, bad_token_ids, "
                "bad_token_sequences and ignore_eos"
            )
        self._check_stops()

    def _check_stops(self) -> None:
        strings = _as_tuple(self.stop)
        self._need(_are(strings, _is_string), "stop", "a string or strings of whole characters, none of them empty")
        self._need(_are(self.stop_token_ids or (), _is_token), "stop_token_ids", "token ids")
        for name in ("stop_token_sequences", "bad_token_sequences"):
            runs = getattr(self, name) or ()
            self._need(_are(runs, _is_run), name, "lists of token ids, none of them empty")
            _check_size(name, list(map(len, runs)), "tokens")
        self._need(_are(_as_tuple(self.bad), _is_string), "bad", "a word or words, none of them empty")
        self._need(_are(self.bad_token_ids or (), _is_token), "bad_token_ids", "token ids")
        bias = self.logit_bias or {}
        valid = isinstance(bias, Mapping) and all(
            _is_token(token) and is_number(value) and -100 <= value <= 100 for token, value in bias.items()
        )
        self._need(valid, "logit_bias", "numbers from -100 to 100 by token id")
        _check_size("bad", [len(s.encode()) for s in _as_tuple(self.bad)], "bytes")
        _check_size("bad_token_ids", [1 for _ in self.bad_token_ids or ()], "tokens")
        _check_size("stop", [len(s.encode()) for s in strings], "bytes")
        _check_size("stop_token_ids", [1 for _ in self.stop_token_ids or ()], "tokens")

    def _need(self, valid: bool, name: str, needed: str) -> None:
        if not valid:
            raise RequestError(f"{name} is {shown(getattr(self, name))}: it must be {needed}")

    @property
    def stop_strings(self) -> tuple[str, ...]:
        """``stop`` as a tuple."""
        return _as_tuple(self.stop)

    @property
    def bad_words(self) -> tuple[str, ...]:
        """``bad`` as a tuple."""
        return _as_tuple(self.bad)

    @property
    def greedy(self) -> bool:
        """Whether the likeliest token is always taken."""
        unset = all(value is None for value in (self.temperature, self.top_k, self.top_p, self.min_p))
        return unset or self.temperature == 0 or self.top_k == 1 or self.top_p == 0

    @property
    def penalizes(self) -> bool:
        """Whether the choice of a token depends on the tokens before it beyond the logits."""
        return self.repetition_penalty != 1.0 or bool(self.presence_penalty or self.frequency_penalty)

    @property
    def bans(self) -> bool:
        """Whether some tokens may not come."""
        return bool(self.min_tokens or self.bad or self.bad_token_ids or self.bad_token_sequences)

    @property
    def needs_last_token(self) -> bool:
        """Whether the host must know the token before the one to be chosen."""
        return self.penalizes or bool(self.guided_decoding or self.bad or self.bad_token_sequences)

    @property
    def needs_context_logits(self) -> bool:
        """Whether the host needs the logits of each token of the prompt, so that none may be found in the cache."""
        return self.return_context_logits or self.prompt_logprobs

    @property
    def needs_logits(self) -> bool:
        """Whether the host needs the logits of each token that is generated."""
        return self.return_generation_logits


def _as_tuple(values: Any) -> Any:
    if isinstance(values, str):
        return (values,)
    return tuple(values) if isinstance(values, Iterable) else values or ()


def _are(values: Any, test: Callable[[Any], bool]) -> bool:
    return isinstance(values, Iterable) and all(map(test, values))


def _check_size(name: str, sizes: list[int], unit: str) -> None:
    if len(sizes) > MAX_STOPS or sum(sizes) > MAX_STOP_SIZE:
        raise RequestError(
            f"{name} holds {len(sizes)} stops of {sum(sizes)} {unit} in all: give at most {MAX_STOPS} of at most "
            f"{MAX_STOP_SIZE} {unit} in all"
        )


def _is_string(value: Any) -> bool:
    return isinstance(value, str) and value != "" and is_text(value)


def _is_token(value: Any) -> bool:
    return is_number(value, whole=True)


def _is_run(value: Any) -> bool:
    return _are(value, _is_token) and len(value) > 0
