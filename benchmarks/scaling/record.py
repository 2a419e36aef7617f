"""The record of ``python -m benchmarks scaling``: steps by the GPUs of an engine, and the sums between them."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from benchmarks.common.record import Record, RecordPart
from benchmarks.common.target import TargetResult
from benchmarks.engine.record import Engine, Shape


class Sum(RecordPart):
    """A sum between ranks of rows in float16, in a CUDA graph of many: µs of each way."""

    rows: int
    kernel_us: float | None
    """None if our kernel does not take so many."""
    nccl_us: float


class Ranks(RecordPart):
    """What was measured of engines of so many ranks."""

    tp_size: int
    engines: list[Engine]
    """By format; their bytes and tokens are of a rank."""
    sums: list[Sum] = Field(default_factory=list)

    def engine(self, kv: str) -> Engine | None:
        """That of a format, if it was measured."""
        return next((e for e in self.engines if e.kv == kv), None)

    def step_us(self, kv: str, batch: int, context: int) -> float | None:
        """A step's median, if it was measured."""
        engine = self.engine(kv)
        step = None if engine is None else engine.find(batch, context)
        return None if step is None else step.median_us

    def sum_of(self, rows: int) -> Sum | None:
        """A sum, if it was measured."""
        return next((s for s in self.sums if s.rows == rows), None)


class ScalingResults(Record):
    """A run."""

    kind: Literal["scaling"] = "scaling"
    shape: Shape
    nccl: str | None = None
    """Its version."""
    runs: list[Ranks] = Field(default_factory=list)
    """The fewest ranks first."""
    targets: list[TargetResult] = Field(default_factory=list)
    aborted: str | None = None
    """What ended the run before its end."""

    def of(self, tp_size: int) -> Ranks | None:
        """What was measured of so many ranks."""
        return next((run for run in self.runs if run.tp_size == tp_size), None)

    def ratio(self, tp_size: int, over: int, batch: int, context: int, kv: str = "saw_int4") -> float | None:
        """A step's time with so many ranks over that with fewer, if both were measured."""
        runs = self.of(tp_size), self.of(over)
        us, base = (None if run is None else run.step_us(kv, batch, context) for run in runs)
        return None if us is None or base is None else us / base

    def over_fp16(self, batch: int, context: int) -> float | None:
        """``saw_int4``'s tokens/s over ``fp16``'s, with the most ranks."""
        us, base = (self.runs[-1].step_us(kv, batch, context) for kv in ("saw_int4", "fp16"))
        return None if us is None or base is None else base / us

    @property
    def capacity(self) -> float | None:
        """Tokens that fit with ``saw_int4`` over those with ``fp16``, with the most ranks."""
        ours, theirs = (self.runs[-1].engine(kv) for kv in ("saw_int4", "fp16"))
        return None if ours is None or theirs is None else ours.tokens / theirs.tokens
