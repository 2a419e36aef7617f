"""The record of ``python -m benchmarks accuracy``."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import Field

from benchmarks.common.record import Record


class AccuracyResults(Record):
    """Every cache on each of the models."""

    kind: Literal["accuracy"] = "accuracy"

    num_tokens: int
    """Of the held-out text."""
    window: int
    calibration_tokens: int
    range_factor: float
    """The default at the example's head_dim."""
    models: dict[str, dict[str, Any]] = Field(default_factory=dict)
    """By model: tables of caches, each with the fields of :class:`saw_trtllm.eval.metrics.Quality`; errors, outliers
    and the layers suggested, as :mod:`saw_trtllm.eval` gives them."""
