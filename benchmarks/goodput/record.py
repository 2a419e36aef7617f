"""The record of ``python -m benchmarks goodput``."""

from __future__ import annotations

from typing import Literal

from benchmarks.common.record import Record, RecordPart


class Load(RecordPart):
    """The conversations, which all begin at once and go on at their own pace."""

    conversations: int
    turns: int
    first_len: int
    """Tokens of a first turn."""
    turn_len: int
    """Tokens of each further one."""
    answer_len: int
    system_len: int = 0
    """Tokens with which all conversations begin."""
    think_time_s: float = 0.0
    max_ttft_ms: float
    """A request counts for the goodput whose first token comes within so many ms,"""
    max_tpot_ms: float
    """and the others within so many each, on average."""


class Point(RecordPart):
    """What a server made of the load with a pool of so many bytes."""

    server: str
    kv: str
    pool_bytes: int
    host_bytes: int = 0
    duration_s: float
    goodput_requests_per_s: float
    requests_per_s: float
    output_tokens_per_s: float
    input_tokens: int
    reused_tokens: int
    host_tokens: int = 0
    """Of the reused ones those that came back from the host."""
    first_ms_p50: float
    first_ms_p90: float
    between_ms_p50: float
    between_ms_p90: float


class GoodputResults(Record):
    """A run, or several of one load."""

    kind: Literal["goodput"] = "goodput"

    model: str
    """Whose shape the engines have."""
    workload: Load
    points: list[Point]
