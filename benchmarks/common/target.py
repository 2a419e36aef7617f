"""Targets: a number that a run must reach, and whether it did."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal

from benchmarks.common.record import RecordPart
from benchmarks.common.report import Table

Unit = Literal["", "µs", "%", "x"]


class TargetResult(RecordPart):
    """A target and whether it was met; None where what it needs was not measured."""

    must: str
    """In words, with the limit."""
    value: float | None
    unit: Unit = ""
    met: bool | None

    @property
    def measured(self) -> str:
        """The value with its unit; a share is a number from 0 to 1."""
        if self.value is None:
            return "not measured"
        if self.unit == "%":
            return f"{100 * self.value:.1f} %"
        return f"{self.value:.1f} µs" if self.unit == "µs" else f"{self.value:.3f}{self.unit}"


@dataclass(frozen=True)
class Limit:
    """The least or the most that a value may be."""

    limit: float
    least: bool = True

    def met(self, value: float) -> bool:
        """Whether a measured value reaches it."""
        return value >= self.limit if self.least else value <= self.limit

    def judge(self, must: str, value: float | None, unit: Unit = "") -> TargetResult:
        """Hold it against a value; None is one that was not measured."""
        return TargetResult(must=must, value=value, unit=unit, met=None if value is None else self.met(value))


def target_table(targets: Iterable[tuple[tuple[str, ...], TargetResult]], header: tuple[str, ...] = ()) -> Table:
    """Each target with the cells before it, what was measured, and whether it was met."""
    rows = [[*header, "must", "measured", "met"]]
    for cells, t in targets:
        rows.append([*cells, t.must, t.measured, "-" if t.met is None else "yes" if t.met else "no"])
    return rows
