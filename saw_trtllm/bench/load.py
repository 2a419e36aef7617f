"""Requests sent to an engine, so many at a time, and the times at which their tokens came."""

from __future__ import annotations

import asyncio
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import NamedTuple

import numpy as np
from pydantic import BaseModel

from saw_trtllm.bench.workload import Conversation, Turn
from saw_trtllm.errors import ConfigError, RequestError
from saw_trtllm.llm import LLM
from saw_trtllm.runtime.sampling_params import SamplingParams

_PERCENTILES = (50, 90, 99)


class Percentiles(BaseModel):
    """Of a set of times, in milliseconds."""

    mean: float
    p50: float
    p90: float
    p99: float

    @classmethod
    def of(cls, seconds: Sequence[float]) -> Percentiles | None:
        """None of no times: texts of one token have no time between tokens."""
        if not seconds:
            return None
        p50, p90, p99 = np.percentile(seconds, _PERCENTILES)
        return cls(mean=fmean(seconds) * 1e3, p50=p50 * 1e3, p90=p90 * 1e3, p99=p99 * 1e3)


class Report(BaseModel):
    """What a load gave.

    Attributes
    ----------
    num_requests, concurrency : int
        Requests in all, each turn being one, and conversations in flight at a time.
    input_tokens, output_tokens : int
        Of all requests.
    reused_tokens : int
        Of the input tokens those that were found in the cache.
    hit_rates : dict of str to float
        The share of the input tokens that was found in the "pool", came back from the "host" and from "disk".
    moved_bytes : dict of str to int
        Bytes of blocks "stored" to the host and "loaded" from it, "disk_written" and "disk_read".
    evicted_blocks : int
        Blocks that the pool gave up for others.
    duration_s : float
        From the first request's start to the last one's end.
    output_tokens_per_s, total_tokens_per_s, requests_per_s : float
    time_to_first_token_ms : Percentiles
        From sending a request to its first piece of text.
    time_between_tokens_ms : Percentiles or None
        Gaps between the pieces of a text, each divided by the tokens of the later piece.
    request_latency_ms : Percentiles
        From sending a request to its end.
    goodput_requests_per_s : float
        Requests within the limits, per second.
    """

    num_requests: int
    concurrency: int
    input_tokens: int
    output_tokens: int
    reused_tokens: int
    hit_rates: dict[str, float]
    moved_bytes: dict[str, int]
    evicted_blocks: int
    duration_s: float
    output_tokens_per_s: float
    total_tokens_per_s: float
    requests_per_s: float
    time_to_first_token_ms: Percentiles
    time_between_tokens_ms: Percentiles | None
    request_latency_ms: Percentiles
    goodput_requests_per_s: float


class Limits(NamedTuple):
    """What a user still calls fast: milliseconds to a request's first token, and on average between its tokens."""

    first_token_ms: float = math.inf
    between_tokens_ms: float = math.inf


@dataclass(frozen=True)
class _Timing:
    """A request's tokens, and its times in seconds."""

    input_tokens: int
    output_tokens: int
    reused_tokens: int
    first: float
    gaps: list[float]
    whole: float

    def is_within(self, limits: Limits) -> bool:
        between = fmean(self.gaps) if self.gaps else 0.0
        return self.first * 1e3 <= limits.first_token_ms and between * 1e3 <= limits.between_tokens_ms


def check_load(llm: LLM, conversations: Sequence[Conversation]) -> None:
    """Look at all conversations before any is held.

    Raises
    ------
    ConfigError
        If the engine, or its KV cache, cannot hold one.
    """
    for number, conversation in enumerate(conversations, 1):
        *before, last = conversation
        params = SamplingParams(max_tokens=last.output_len, ignore_eos=True)
        said = sum(len(_ids(llm, turn)) + turn.output_len for turn in before)
        try:
            llm.check([0] * said + _ids(llm, last) if before else last.prompt, params)
        except RequestError as e:
            turn = f" cannot come to its turn {len(conversation)}" if before else " cannot be held"
            raise ConfigError(f"conversation {number}{turn}: {e}") from e


def run_load(
    llm: LLM,
    conversations: Sequence[Conversation],
    concurrency: int,
    progress: Callable[[], None] | None = None,
    limits: Limits | None = None,
) -> Report:
    """Do what :func:`hold_load` does, and wait for it."""
    return asyncio.run(hold_load(llm, conversations, concurrency, progress, limits))


async def hold_load(
    llm: LLM,
    conversations: Sequence[Conversation],
    concurrency: int,
    progress: Callable[[], None] | None = None,
    limits: Limits | None = None,
) -> Report:
    """Hold conversations, at most ``concurrency`` at a time, and time their requests.

    Every text has its full length: end tokens do not end it.

    Parameters
    ----------
    llm : LLM
    conversations : sequence of Conversation
    concurrency : int
    progress : callable, optional
        Called when a request has ended.
    limits : Limits, optional
        What counts for the goodput; by default everything.

    Raises
    ------
    RequestError
        If a request does not fit the engine.
    """
    before = llm.stats()
    start = time.perf_counter()
    timings = await _hold(llm, conversations, concurrency, progress or (lambda: None))
    duration = time.perf_counter() - start
    output_tokens = sum(t.output_tokens for t in timings)
    input_tokens = sum(t.input_tokens for t in timings)
    stats = llm.stats().since(before)
    return Report(
        num_requests=len(timings),
        concurrency=concurrency,
        input_tokens=input_tokens,
        output_tokens=output_tokens,
        reused_tokens=sum(t.reused_tokens for t in timings),
        hit_rates=stats.hit_rates,
        moved_bytes={
            name: getattr(stats, f"{name}_blocks_total") * stats.block_bytes
            for name in ("stored", "loaded", "disk_written", "disk_read")
        },
        evicted_blocks=stats.evicted_blocks_total,
        duration_s=duration,
        output_tokens_per_s=output_tokens / duration,
        total_tokens_per_s=(input_tokens + output_tokens) / duration,
        requests_per_s=len(timings) / duration,
        time_to_first_token_ms=Percentiles.of([t.first for t in timings]),
        time_between_tokens_ms=Percentiles.of([gap for t in timings for gap in t.gaps]),
        request_latency_ms=Percentiles.of([t.whole for t in timings]),
        goodput_requests_per_s=sum(t.is_within(limits or Limits()) for t in timings) / duration,
    )


async def _hold(
    llm: LLM, conversations: Sequence[Conversation], concurrency: int, progress: Callable[[], None]
) -> list[_Timing]:
    free, start = asyncio.Semaphore(concurrency), time.perf_counter()
    # Where a trace says when its requests came, they wait from then on, for a place among those in flight too.
    timed = any(conversation[0].delay for conversation in conversations)

    async def one(conversation: Conversation) -> list[_Timing]:
        due = start + conversation[0].delay
        await asyncio.sleep(due - time.perf_counter())
        timings: list[_Timing] = []
        said: list[int] = []
        async with free:
            for i, turn in enumerate(conversation):
                if i:
                    await asyncio.sleep(turn.delay)
                # A text that stands for itself is tokenized as a user's would be, special tokens and all.
                prompt = turn.prompt if len(conversation) == 1 else said + _ids(llm, turn)
                sent = due if timed and i == 0 else time.perf_counter()
                timing, said = await _request(llm, prompt, turn.output_len, sent)
                timings.append(timing)
                progress()
        return timings

    return [timing for timings in await asyncio.gather(*map(one, conversations)) for timing in timings]


def _ids(llm: LLM, turn: Turn) -> list[int]:
    if not isinstance(turn.prompt, str):
        return turn.prompt
    assert llm.tokenizer is not None  # without it no dataset of such conversations is read
    return llm.tokenizer.encode(turn.prompt)


async def _request(llm: LLM, prompt: str | list[int], output_len: int, start: float) -> tuple[_Timing, list[int]]:
    """A request's times since ``start``, and all that has been said by its end."""
    params = SamplingParams(max_tokens=output_len, ignore_eos=True)
    last = start
    first, num_reused = 0.0, 0
    prompt_ids: list[int] = []
    text: list[int] = []
    gaps: list[float] = []
    async for output in llm.generate_async(prompt, params, streaming=True):
        now, new = time.perf_counter(), len(output.outputs[0].token_ids_diff)
        if not first:
            first = now - start
        elif new:
            gaps += [(now - last) / new] * new
        last = now
        prompt_ids, text, num_reused = output.prompt_token_ids, output.outputs[0].token_ids, output.num_reused_tokens
    return _Timing(len(prompt_ids), len(text), num_reused, first, gaps, last - start), [*prompt_ids, *text]
