"""Requests sent to an engine, so many at a time, and the times at which their tokens came."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from statistics import fmean

import numpy as np
from pydantic import BaseModel

from saw_trtllm.bench.workload import Job
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
        Requests in all, and in flight at a time.
    input_tokens, output_tokens : int
        Of all requests.
    duration_s : float
        From the first request's start to the last one's end.
    output_tokens_per_s, total_tokens_per_s, requests_per_s : float
    time_to_first_token_ms : Percentiles
        From sending a request to its first piece of text.
    time_between_tokens_ms : Percentiles or None
        Gaps between the pieces of a text, each divided by the tokens of the later piece.
    request_latency_ms : Percentiles
        From sending a request to its end.
    """

    num_requests: int
    concurrency: int
    input_tokens: int
    output_tokens: int
    duration_s: float
    output_tokens_per_s: float
    total_tokens_per_s: float
    requests_per_s: float
    time_to_first_token_ms: Percentiles
    time_between_tokens_ms: Percentiles | None
    request_latency_ms: Percentiles


@dataclass(frozen=True)
class _Timing:
    """A request's tokens, and its times in seconds."""

    input_tokens: int
    output_tokens: int
    first: float
    gaps: list[float]
    whole: float


def run_load(llm: LLM, jobs: Sequence[Job], concurrency: int, progress: Callable[[], None] | None = None) -> Report:
    """Send requests, at most ``concurrency`` at a time, and time them.

    Every text has its full length: end tokens do not end it.

    Parameters
    ----------
    llm : LLM
    jobs : sequence of Job
    concurrency : int
    progress : callable, optional
        Called when a request has ended.

    Raises
    ------
    RequestError
        If a request does not fit the engine.
    """
    start = time.perf_counter()
    timings = asyncio.run(_send(llm, jobs, concurrency, progress or (lambda: None)))
    duration = time.perf_counter() - start
    output_tokens = sum(t.output_tokens for t in timings)
    input_tokens = sum(t.input_tokens for t in timings)
    return Report(
        num_requests=len(timings),
        concurrency=concurrency,
        input_tokens=input_tokens,
        output_tokens=output_tokens,
        duration_s=duration,
        output_tokens_per_s=output_tokens / duration,
        total_tokens_per_s=(input_tokens + output_tokens) / duration,
        requests_per_s=len(timings) / duration,
        time_to_first_token_ms=Percentiles.of([t.first for t in timings]),
        time_between_tokens_ms=Percentiles.of([gap for t in timings for gap in t.gaps]),
        request_latency_ms=Percentiles.of([t.whole for t in timings]),
    )


async def _send(llm: LLM, jobs: Sequence[Job], concurrency: int, progress: Callable[[], None]) -> list[_Timing]:
    free = asyncio.Semaphore(concurrency)

    async def one(job: Job) -> _Timing:
        async with free:
            timing = await _request(llm, job)
        progress()
        return timing

    return await asyncio.gather(*map(one, jobs))


async def _request(llm: LLM, job: Job) -> _Timing:
    params = SamplingParams(max_tokens=job.output_len, ignore_eos=True)
    start = last = time.perf_counter()
    first, num_input, num_output = 0.0, 0, 0
    gaps: list[float] = []
    async for output in llm.generate_async(job.prompt, params, streaming=True):
        now, new = time.perf_counter(), len(output.outputs[0].token_ids_diff)
        if not first:
            first = now - start
        elif new:
            gaps += [(now - last) / new] * new
        last = now
        num_input, num_output = len(output.prompt_token_ids), len(output.outputs[0].token_ids)
    return _Timing(num_input, num_output, first, gaps, last - start)
