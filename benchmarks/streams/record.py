"""The record of ``python -m benchmarks streams``."""

from __future__ import annotations

from typing import Literal

from benchmarks.common.record import Record, RecordPart


class Row(RecordPart):
    """What so many clients, who all ask at once and again, got by one way."""

    path: str
    clients: int
    tokens_per_s: float
    """Of all texts, from the first request to the end of the last text."""
    responses_per_s: float | None = None
    """None where they are not counted."""
    first_ms_p50: float
    """From the request to the first piece of text, or to the whole."""
    first_ms_p90: float
    cpu_us_per_token: dict[str, float]
    """CPU time of each process on the way, of the clients not."""


class StreamsResults(Record):
    """A run."""

    kind: Literal["streams"] = "streams"

    model: str
    pace: list[float] | None
    """Milliseconds of a step, of each of its sequences and of each prompt token; None for the engine itself."""
    prompt_tokens: int
    output_tokens: int
    requests: int
    """Of each client."""
    rows: list[Row]
