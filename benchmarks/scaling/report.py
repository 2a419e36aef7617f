"""Tables and plot of a scaling record."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING

from benchmarks.common.report import Report, Table, environment_table
from benchmarks.common.target import target_table
from benchmarks.engine.record import Engine
from benchmarks.scaling.record import ScalingResults

if TYPE_CHECKING:
    from matplotlib.figure import Figure

#: Batches and contexts of the plot.
CASES = ((1, 1024), (64, 8192))
_COLOURS = {"saw_int4": "#0072B2", "fp16": "#009E73"}
_MARKERS = ("o", "s")


def step_table(results: ScalingResults) -> Table:
    """A row for each format and step: µs by ranks, the share of the fewest's, and what goes between ranks."""
    runs = results.runs
    rows = [["KV cache", "sequences x context", *(f"tp {run.tp_size}" for run in runs), "between ranks"]]
    cases = {(e.kv, s.batch, s.context) for run in runs for e in run.engines for s in e.steps}
    for kv, batch, context in sorted(cases):
        times = [run.step_us(kv, batch, context) for run in runs]
        cells = ["-" if us is None else f"{us:.0f} µs{_over(us, times[0])}" for us in times]
        shares = [_share(run.engine(kv), batch, context) for run in runs if run.tp_size > 1]
        rows.append([kv, f"{batch}x{context}", *cells, ", ".join(shares)])
    return rows


def _over(us: float, base: float | None) -> str:
    return "" if base in (None, us) else f" ({us / base:.2f}x)"


def _share(engine: Engine | None, batch: int, context: int) -> str:
    """What goes between ranks, of a step whose layers were timed one by one."""
    profiles = () if engine is None else engine.profiles
    parts = next((p.parts for p in profiles if (p.batch, p.context) == (batch, context)), None)
    return "-" if parts is None else f"{100 * parts.get('ranks', 0.0) / sum(parts.values()):.0f} %"


def tokens_table(results: ScalingResults) -> Table:
    """Tokens that fit into all ranks' pools together: each has its part of every token."""
    rows = [["tokens that fit", *(f"tp {run.tp_size}" for run in results.runs)]]
    for kv in sorted({e.kv for run in results.runs for e in run.engines}):
        engines = [run.engine(kv) for run in results.runs]
        rows.append([kv, *("-" if e is None else f"{e.tokens:,}" for e in engines)])
    return rows


def sums_table(results: ScalingResults) -> Table:
    """µs of a sum between ranks, of our kernel and of NCCL."""
    runs = [run for run in results.runs if run.sums]
    columns = [f"tp {run.tp_size}, {way}" for run in runs for way in ("our kernel", "NCCL")]
    rows = [[f"rows of {results.shape.hidden_size}", *columns]]
    for count in sorted({s.rows for run in runs for s in run.sums}):
        sums = [run.sum_of(count) for run in runs]
        times = [us for s in sums for us in ((None, None) if s is None else (s.kernel_us, s.nccl_us))]
        rows.append([f"{count}", *("" if us is None else f"{us:.1f}" for us in times)])
    return rows


def plot(results: ScalingResults, figure: Figure) -> None:
    """Step times over the number of ranks, beside a line of ideal halves."""
    axes = figure.add_subplot()
    ranks = [run.tp_size for run in results.runs]
    for kv, colour in _COLOURS.items():
        for (batch, context), marker in zip(CASES, _MARKERS, strict=True):
            measured = {run.tp_size: run.step_us(kv, batch, context) for run in results.runs}
            times = {n: us for n, us in measured.items() if us is not None}
            if not times:
                continue
            label = f"{kv}, {batch}x{context}"
            axes.plot(list(times), list(times.values()), marker=marker, color=colour, linewidth=1.2, label=label)
            first = min(times)
            axes.plot(ranks, [times[first] * first / n for n in ranks], color=colour, linewidth=0.6, linestyle=":")
    axes.set_xscale("log", base=2)
    axes.set_yscale("log")
    axes.set_xticks(ranks, [str(n) for n in ranks])
    axes.yaxis.set_major_formatter("{x:,.0f}")
    axes.set_xlabel("GPUs (dotted: as if ranks cost nothing)")
    axes.set_ylabel("step, µs")
    axes.set_title(f"Decode step over GPUs\n{results.environment.gpu}, {results.shape}")
    figure.legend(loc="outside right upper")


def report(results: ScalingResults) -> Report:
    """What the record says."""
    nccl = [["NCCL", results.nccl]] if results.nccl else []
    tables = {
        "environment": environment_table(results.environment, ["model", str(results.shape)], *nccl),
        "steps": step_table(results),
        "tokens": tokens_table(results),
        "sums": sums_table(results),
        "targets": target_table(((), t) for t in results.targets),
    }
    return Report(tables, _numbers(results), {"steps": partial(plot, results)})


def _numbers(results: ScalingResults) -> dict[str, str]:
    numbers = {"commit": results.environment.commit or "unknown", "GPU": results.environment.gpu or "unknown"}
    for run in results.runs:
        for engine in run.engines:
            numbers[f"tp {run.tp_size} {engine.kv} tokens"] = f"{engine.tokens:,}"
            for s in engine.steps:
                numbers[f"tp {run.tp_size} {engine.kv} {s.batch}x{s.context} µs"] = f"{s.median_us:.0f}"
        for s in run.sums:
            if s.kernel_us is not None:
                numbers[f"tp {run.tp_size} sum of {s.rows}"] = f"{s.kernel_us:.1f}"
            numbers[f"tp {run.tp_size} NCCL's sum of {s.rows}"] = f"{s.nccl_us:.1f}"
    return numbers
