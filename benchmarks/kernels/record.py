"""The record of the kernels' benchmark."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from benchmarks.common.record import Record, RecordPart
from benchmarks.common.target import TargetResult
from benchmarks.kernels.cases import Suite


class Bandwidth(RecordPart):
    """What the card's memory gives, measured in the same run, in GB/s."""

    read_gbps: float
    copy_gbps: float
    """Read and written bytes together."""


class Measurement(RecordPart):
    """A contender's times in a case."""

    contender: str
    detail: str = ""
    """The variant that was best: a backend, a number of splits."""
    failed: dict[str, str] = Field(default_factory=dict)
    """Variants that could not run, and why: the best is that of the others."""
    median_us: float
    p10_us: float
    p90_us: float
    repetitions: int
    cuda_graph: bool
    bytes: int
    """That must move, at least."""
    gbps: float
    share: float | None = None
    """Of the bandwidth that bounds the suite; None where arithmetic does."""
    tflops: float | None = None
    cosine: float | None = None
    """Between a sample of the output and fp32 attention on the unquantized keys and values."""


class CaseResult(RecordPart):
    """A case's measurements."""

    suite: Suite
    name: str
    batch: int
    tokens: int
    history: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    tokens_per_block: int
    measurements: list[Measurement]
    missing: dict[str, str] = Field(default_factory=dict)
    """Contenders that were not measured, and why."""
    targets: list[TargetResult]

    def find(self, contender: str) -> Measurement | None:
        """A contender's measurement, if there is one."""
        return next((m for m in self.measurements if m.contender == contender), None)


class Results(Record):
    """A run of the kernels' benchmark."""

    kind: Literal["kernels"] = "kernels"
    flush: str
    """What emptied the L2 before each run."""
    bandwidth: Bandwidth
    cases: list[CaseResult]
    aborted: str | None = None
    """What ended the run before its last case."""

    def suite(self, name: str) -> list[CaseResult]:
        """The cases of a suite."""
        return [case for case in self.cases if case.suite == name]
