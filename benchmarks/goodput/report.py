"""The goodput record as a table, numbers and a plot."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING

from benchmarks.common.report import Report, Table, environment_table
from benchmarks.goodput.record import GoodputResults, Point

if TYPE_CHECKING:
    from matplotlib.figure import Figure

OURS = "saw_trtllm"
#: The formats' colours in other plots, and others for a peer's.
_COLOURS = {
    (OURS, "saw_int4"): "#0072B2",
    (OURS, "int4"): "#56B4E9",
    (OURS, "fp16"): "#009E73",
    ("vLLM", "fp8"): "#D55E00",
    ("vLLM", "fp16"): "#CC79A7",
}
_HEADER = [
    *("server", "KV cache", "pool GiB", "goodput, requests/s", "requests/s", "answer tokens/s", "prompts found"),
    *("from the host", "first token ms p50", "p90", "between tokens ms p50", "p90"),
]


def report(results: GoodputResults) -> Report:
    """What the record says."""
    load = results.workload
    said = (
        f"{load.conversations} conversations of {load.turns} turns, {load.system_len} tokens that all begin with, "
        f"{load.first_len} and then {load.turn_len} a turn, answers of {load.answer_len}, "
        f"{load.think_time_s:g} s between"
    )
    counted = f"first token within {load.max_ttft_ms:g} ms, then {load.max_tpot_ms:g} ms a token"
    environment = environment_table(
        results.environment, ["engines of", results.model], ["load", said], ["goodput", counted]
    )
    points = sorted(results.points, key=lambda p: (p.server, p.kv, p.host_bytes, p.pool_bytes))
    numbers = {f"{_name(p)} {_gib(p.pool_bytes)} goodput": f"{p.goodput_requests_per_s:.2f}" for p in points}
    numbers |= {f"{_name(p)} {_gib(p.pool_bytes)} tokens/s": f"{p.output_tokens_per_s:,.0f}" for p in points}
    tables = {"environment": environment, "points": _table(points)}
    return Report(tables, numbers, {"pools": partial(_plot, results, points)})


def _table(points: list[Point]) -> Table:
    rows = [_HEADER]
    for p in points:
        found, loaded = (f"{100 * tokens / p.input_tokens:.1f} %" for tokens in (p.reused_tokens, p.host_tokens))
        rates = (f"{p.goodput_requests_per_s:.2f}", f"{p.requests_per_s:.2f}", f"{p.output_tokens_per_s:,.0f}")
        times = (p.first_ms_p50, p.first_ms_p90, p.between_ms_p50, p.between_ms_p90)
        pool = _gib(p.pool_bytes) + (f" + {_gib(p.host_bytes)} on the host" if p.host_bytes else "")
        rows.append([p.server, p.kv, pool, *rates, found, loaded, *(f"{ms:,.1f}" for ms in times)])
    return rows


def _name(p: Point) -> str:
    return f"{p.server} {p.kv}" + (f" + {_gib(p.host_bytes)}" if p.host_bytes else "")


def _gib(size: int) -> str:
    return f"{size / 2**30:.3g}"


def _plot(results: GoodputResults, points: list[Point], figure: Figure) -> None:
    """Goodput by the pool's bytes: a line for each server and cache; others' are broken, with a host's tier dotted."""
    axes = figure.add_subplot()
    for name in dict.fromkeys(map(_name, points)):
        line = [p for p in points if _name(p) == name]
        p = line[0]
        axes.plot(
            [p.pool_bytes / 2**30 for p in line],
            [p.goodput_requests_per_s for p in line],
            marker="o",
            markersize=4,
            linestyle=":" if p.host_bytes else "-" if p.server == OURS else "--",
            color=_COLOURS.get((p.server.split()[0], p.kv), "#555555"),
            label=name + (" GiB on the host" if p.host_bytes else ""),
        )
    axes.set_xscale("log", base=2)
    ticks = sorted({p.pool_bytes / 2**30 for p in points})
    axes.set_xticks(ticks, [f"{gib:.3g}" for gib in ticks])
    axes.set_ylim(bottom=0)
    axes.set_xlabel("GiB of the KV cache")
    axes.set_ylabel("requests/s within the limits")
    where = results.environment.gpu or results.environment.cpu
    axes.set_title(f"Conversations that come back\n{where}, {results.model}")
    figure.legend(loc="outside lower center", ncols=2)
