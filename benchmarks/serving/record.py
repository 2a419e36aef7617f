"""The record of ``python -m benchmarks serving``."""

from __future__ import annotations

from typing import Literal

from benchmarks.common.record import Record, RecordPart


class Row(RecordPart):
    """What so many clients at once saw, without the first request of each, which finds the server idle."""

    kv: str
    concurrency: int
    requests_per_s: float
    tokens_per_s: float
    first_ms_p50: float
    """From the request to the first piece of text."""
    first_ms_p90: float
    request_ms_p50: float
    request_ms_p90: float


class ServingResults(Record):
    """A run."""

    kind: Literal["serving"] = "serving"

    model: str
    """Whose engines answered."""
    output_tokens: int
    prompt_words: int | None
    """None for a few beginnings of Python."""
    stream: bool
    rows: list[Row]
