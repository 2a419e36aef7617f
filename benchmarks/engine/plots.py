"""The plot of an engine record, drawn from it and nothing else."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING

from benchmarks.engine.record import EngineResults

if TYPE_CHECKING:
    from matplotlib.figure import Figure

#: The colours that the kernels' plots give to the same formats.
_COLOURS = {"saw_int4": "#0072B2", "fp16": "#009E73"}
#: Batches of the plot of tokens/s, and how each is marked.
_MARKERS = {1: "o", 16: "s", 64: "^", 256: "D"}


def plots(results: EngineResults) -> dict[str, Callable[[Figure], None]]:
    """What draws ``decode``, if steps were measured."""
    measured = any(e.steps for e in results.engines)
    return {"decode": partial(_decode, results)} if measured else {}


def _decode(results: EngineResults, figure: Figure) -> None:
    """Tokens/s by context: a line for each batch and format, of which ``int4`` lies on ``saw_int4``."""
    axes = figure.add_subplot()
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
    axes.set_title(f"Decode against context\n{results.environment.gpu}, {results.shape}")
    figure.legend(loc="outside right upper")
