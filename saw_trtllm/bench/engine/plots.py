"""A plot per question, drawn from an engine record and nothing else."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from saw_trtllm.bench.engine.cases import KVS, PARTS
from saw_trtllm.bench.engine.record import EngineResults
from saw_trtllm.bench.plots import draw_plots

#: The colours that the kernels' plots give to the same formats.
_COLOURS = {"saw_int4": "#0072B2", "fp16": "#009E73"}
_PART_COLOURS = ("#0072B2", "#E69F00", "#999999", "#CC79A7", "#F0E442")
#: Cases of the plot of parts.
_CASES = ((1, 8192), (64, 1024), (64, 8192))
#: Batches of the plot of tokens/s, and how each is marked.
_MARKERS = {1: "o", 16: "s", 64: "^", 256: "D"}


def draw(results: EngineResults, folder: Path) -> list[Path]:
    """Draw ``engine_decode.svg`` and ``engine_parts.svg``: those that were measured.

    Raises
    ------
    SawError
        As :func:`saw_trtllm.bench.plots.draw_plots`.
    """
    plots: dict[str, Callable[[Any, EngineResults], None]] = {}
    if any(e.steps for e in results.engines):
        plots["engine_decode"] = _decode
    if any(e.profiles for e in results.engines):
        plots["engine_parts"] = _parts
    return draw_plots(folder, {name: partial(plot, results=results) for name, plot in plots.items()})


def _title(axes: Any, results: EngineResults, text: str) -> None:
    axes.set_title(f"{text}\n{results.environment.gpu}, {results.shape}", fontsize=9)


def _decode(axes: Any, results: EngineResults) -> None:
    """Tokens/s by context: a line for each batch and format, of which ``int4`` lies on ``saw_int4``."""
    for e in (e for e in results.engines if e.kv in _COLOURS):
        for batch, marker in _MARKERS.items():
            steps = [s for s in e.steps if s.batch == batch]
            axes.plot(
                [s.context for s in steps],
                [s.tokens_per_second for s in steps],
                marker=marker,
                markersize=5,
                linewidth=1.2,
                color=_COLOURS[e.kv],
                label=e.kv if batch == max(_MARKERS) else None,
            )
    for batch, marker in _MARKERS.items():
        axes.plot([], [], marker=marker, color="#555555", linestyle="none", label=f"batch {batch}")
    axes.set_xscale("log", base=2)
    axes.set_yscale("log")
    ticks = sorted({s.context for e in results.engines for s in e.steps})
    axes.set_xticks(ticks, [f"{n // 1024}k" if n % 1024 == 0 else f"{n}" for n in ticks])
    axes.yaxis.set_major_formatter("{x:,.0f}")
    axes.set_xlabel("context")
    axes.set_ylabel("tokens/s")
    _title(axes, results, "Decode against context")


def _parts(axes: Any, results: EngineResults) -> None:
    """Bars of the parts of a step, the formats of a case side by side."""
    measured = {(p.batch, p.context) for e in results.engines for p in e.profiles}
    cases = [case for case in _CASES if case in measured] or sorted(measured)
    kvs = [kv for kv in KVS if results.engine(kv)]
    width = 0.8 / len(kvs)
    ticks = []
    for i, kv in enumerate(kvs):
        profiles = {(p.batch, p.context): p for e in results.engines if e.kv == kv for p in e.profiles}
        places = [(n + (i - (len(kvs) - 1) / 2) * width, case) for n, case in enumerate(cases) if case in profiles]
        bottom = [0.0] * len(places)
        for (part, words), colour in zip(PARTS.items(), _PART_COLOURS, strict=True):
            heights = [profiles[case].parts.get(part, 0.0) / 1e3 for _, case in places]
            label = words if i == 0 else None
            axes.bar([x for x, _ in places], heights, 0.9 * width, bottom, color=colour, label=label)
            bottom = [a + b for a, b in zip(bottom, heights, strict=True)]
        middle = i == len(kvs) // 2
        ticks += [(x, f"{kv}\n{batch}x{context}" if middle else kv) for x, (batch, context) in places]
    axes.set_xticks([x for x, _ in ticks], [text for _, text in ticks], fontsize=8)
    axes.grid(axis="x", visible=False)
    axes.set_ylabel("ms, layers timed one by one")
    _title(axes, results, "Parts of a decode step")
