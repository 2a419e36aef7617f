"""``python -m benchmarks scaling``: engines of one shape over several numbers of GPUs, in one run."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from benchmarks.common.target import Limit, TargetResult, Unit
from benchmarks.engine.plan import Plan, build_missing
from benchmarks.engine.record import Shape
from benchmarks.engine.run import environment
from benchmarks.scaling.record import Ranks, ScalingResults, Sum
from benchmarks.scaling.sums import measure_sums
from saw_trtllm.errors import SawError

logger = logging.getLogger(__name__)

#: What a run must reach: in words, a shape or None for all, how it is computed, the limit and its unit.
TARGETS: tuple[tuple[str, str | None, Callable[[ScalingResults], float | None], Limit, Unit], ...] = (
    ("1x1024: two GPUs at most {}x of one's step", None, lambda r: r.ratio(2, 1, 1, 1024), Limit(0.62, False), "x"),
    ("64x8192: two GPUs at most {}x of one's step", None, lambda r: r.ratio(2, 1, 64, 8192), Limit(0.56, False), "x"),
    ("64x8192: four GPUs at most {}x of two's step", None, lambda r: r.ratio(4, 2, 64, 8192), Limit(0.58, False), "x"),
    ("a sum of 1 row between two GPUs in at most {} µs", None, lambda r: _sum_us(r, 1), Limit(12, False), "µs"),
    ("a sum of 64 rows between two GPUs in at most {} µs", None, lambda r: _sum_us(r, 64), Limit(20, False), "µs"),
    ("64x8192: at least {}x the tokens/s of fp16", "Qwen3 32B", lambda r: r.over_fp16(64, 8192), Limit(2), "x"),
    ("at least {}x the tokens of fp16 fit", "Qwen3 32B", lambda r: r.capacity, Limit(3.7), "x"),
)


def run_scaling(
    plans: Sequence[Plan], command: str, commit: str | None = None, output: Path | None = None
) -> ScalingResults:
    """Build what is missing, and measure.

    Parameters
    ----------
    plans : sequence of Plan
        Of models that differ in the number of their ranks alone, the fewest first.
    command : str
        As it was typed, for the record.
    commit : str, optional
        For a tree without its git repository.
    output : Path, optional
        Where the record is written after each engine, so that an interrupted run is not lost.

    Raises
    ------
    SawError
        If there is no GPU or no TensorRT, or an engine cannot be built.
    """
    # After the first look for TensorRT and a GPU, whose sentence is better than an import's.
    where = environment(command, commit)
    from benchmarks.engine.on_gpu import measure_ranks

    results = ScalingResults(environment=where, shape=Shape.of(plans[0].model, plans[0].qformat))

    def keep(**changes: Any) -> None:
        nonlocal results
        results = results.model_copy(update=changes)
        results = results.model_copy(update={"targets": judge(results)})
        if output is not None:
            results.save(output)

    try:
        for plan, build_s in zip(plans, build_all(plans), strict=True):
            run = Ranks(tp_size=plan.model.mapping.tp_size, engines=[])
            before = results.runs
            for kv in plan.kvs:
                engine = measure_ranks(plan, kv, build_s.get(kv))
                run = run.model_copy(update={"engines": [*run.engines, engine]})
                keep(runs=[*before, run])
            if run.tp_size > 1:
                nccl, sums = measure_sums(run.tp_size, plan.model.hidden_size)
                found = [Sum(rows=rows, kernel_us=ours, nccl_us=theirs) for rows, ours, theirs in sums]
                keep(runs=[*before, run.model_copy(update={"sums": found})], nccl=nccl)
    except (SawError, RuntimeError) as e:
        if not results.runs:
            raise
        logger.exception("the run ends early")
        keep(aborted=f"the run ended early: {e}")
    except KeyboardInterrupt:
        keep(aborted="the run was interrupted")
    return results


def build_all(plans: Sequence[Plan]) -> list[dict[str, float]]:
    """Build what is missing; seconds that each format took, for each plan."""
    for plan in plans:
        plan.folder.mkdir(parents=True, exist_ok=True)
    return [build_missing(plan) for plan in plans]


def judge(results: ScalingResults) -> list[TargetResult]:
    """Hold the targets against a record: those of its shape and of what it measured."""
    found = []
    for words, shape, value_of, limit, unit in TARGETS:
        value = value_of(results) if results.runs and shape in (None, results.shape.model) else None
        if value is not None:
            found.append(limit.judge(words.format(f"{limit.limit:g}"), round(value, 4), unit))
    return found


def _sum_us(results: ScalingResults, rows: int) -> float | None:
    """Of the way that an engine takes."""
    run = results.of(2)
    found = None if run is None else run.sum_of(rows)
    return None if found is None else found.kernel_us or found.nccl_us
