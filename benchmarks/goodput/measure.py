"""A load on a server, ours or vLLM's, and what is kept of it."""

from __future__ import annotations

from typing import Any

from benchmarks.goodput.record import Load, Point
from saw_trtllm.bench.load import Limits, Report, hold_load
from saw_trtllm.bench.workload import Conversation, random_conversations

#: Of a server before it is measured: its first steps compile, capture and touch memory.
_WARMUP = (8, 64, 8)


def conversations(load: Load, vocab_size: int) -> list[Conversation]:
    """The load, the same for every server."""
    lengths = (load.conversations, load.first_len, load.answer_len, vocab_size, 1)
    return random_conversations(*lengths, load.turns, load.turn_len, load.system_len, load.think_time_s)


async def measure(llm: Any, load: Load, vocab_size: int) -> Report:
    """Hold the load once, all conversations at a time."""
    count, prompt, answer = _WARMUP
    await hold_load(llm, random_conversations(count, prompt, answer, vocab_size, 2), count)
    limits = Limits(load.max_ttft_ms, load.max_tpot_ms)
    return await hold_load(llm, conversations(load, vocab_size), load.conversations, limits=limits)


def point(server: str, kv: str, pool_bytes: int, host_bytes: int, report: Report) -> Point:
    """A report as it is kept."""
    between = report.time_between_tokens_ms
    assert between is not None  # an answer has several tokens
    return Point(
        server=server,
        kv=kv,
        pool_bytes=pool_bytes,
        host_bytes=host_bytes,
        duration_s=round(report.duration_s, 3),
        goodput_requests_per_s=round(report.goodput_requests_per_s, 3),
        requests_per_s=round(report.requests_per_s, 3),
        output_tokens_per_s=round(report.output_tokens_per_s, 1),
        input_tokens=report.input_tokens,
        reused_tokens=report.reused_tokens,
        host_tokens=round((report.hit_rates["host"] + report.hit_rates["disk"]) * report.input_tokens),
        first_ms_p50=round(report.time_to_first_token_ms.p50, 2),
        first_ms_p90=round(report.time_to_first_token_ms.p90, 2),
        between_ms_p50=round(between.p50, 2),
        between_ms_p90=round(between.p90, 2),
    )
