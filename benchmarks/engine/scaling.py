"""``python -m benchmarks.engine.scaling RECORD...``: steps over the ranks of an engine, from records of one shape.

Each record is of ``python -m benchmarks engine --tp_size N``, with another N.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from benchmarks.common.report import Table, align, draw
from benchmarks.engine.record import Engine, EngineResults
from saw_trtllm.cli.common import run
from saw_trtllm.errors import ConfigError

if TYPE_CHECKING:
    from matplotlib.figure import Figure

#: Batches and contexts of the plot.
CASES = ((1, 1024), (64, 8192))
_COLOURS = {"saw_int4": "#0072B2", "fp16": "#009E73"}
_MARKERS = ("o", "s", "^")


def by_ranks(records: Sequence[EngineResults]) -> dict[int, EngineResults]:
    """Records by the ranks of their engines, the fewest first.

    Raises
    ------
    ConfigError
        If they are of several shapes, or two of the same number of ranks.
    """
    found = {record.tp_size: record for record in sorted(records, key=lambda record: record.tp_size)}
    if len(found) < len(records):
        raise ConfigError("two records have engines of the same number of ranks: give one of each --tp_size")
    if len(shapes := {str(record.shape) for record in records}) > 1:
        raise ConfigError(f"the records are of {' and of '.join(sorted(shapes))}: give those of one")
    return found


def table(records: dict[int, EngineResults]) -> Table:
    """A row for each format and step: µs by ranks, the share of the fewest's, and what goes between ranks."""
    first = next(iter(records))
    rows = [["KV cache", "sequences x context", *(f"tp {n}" for n in records), "between ranks"]]
    cases = {(e.kv, s.batch, s.context) for record in records.values() for e in record.engines for s in e.steps}
    for kv, batch, context in sorted(cases):
        engines = {n: record.engine(kv) for n, record in records.items()}
        steps = {n: None if e is None else e.find(batch, context) for n, e in engines.items()}
        base = steps[first]
        cells = []
        for n, step in steps.items():
            ratio = "" if step is None or base is None or n == first else f" ({step.median_us / base.median_us:.2f}x)"
            cells.append("-" if step is None else f"{step.median_us:.0f} µs{ratio}")
        shares = [_share(e, batch, context) for e in engines.values()]
        rows.append([kv, f"{batch}x{context}", *cells, ", ".join(shares)])
    return rows


def tokens_table(records: dict[int, EngineResults]) -> Table:
    """Tokens that fit into all ranks' pools together: each has its part of every token."""
    kvs = sorted({e.kv for record in records.values() for e in record.engines})
    rows = [["tokens that fit", *(f"tp {n}" for n in records)]]
    for kv in kvs:
        engines = [record.engine(kv) for record in records.values()]
        rows.append([kv, *("-" if e is None else f"{e.tokens:,}" for e in engines)])
    return rows


def _share(engine: Engine | None, batch: int, context: int) -> str:
    """What goes between ranks, of a step whose layers were timed one by one."""
    profiles = () if engine is None else engine.profiles
    parts = next((p.parts for p in profiles if (p.batch, p.context) == (batch, context)), None)
    return "-" if parts is None else f"{100 * parts.get('ranks', 0.0) / sum(parts.values()):.0f} %"


def plot(records: dict[int, EngineResults], figure: Figure) -> None:
    """Step times over the number of ranks, beside a line of ideal halves."""
    axes = figure.add_subplot()
    ranks = list(records)
    for kv, colour in _COLOURS.items():
        for (batch, context), marker in zip(CASES, _MARKERS, strict=False):
            engines = {n: record.engine(kv) for n, record in records.items()}
            steps = {n: None if e is None else e.find(batch, context) for n, e in engines.items()}
            times = {n: step.median_us for n, step in steps.items() if step is not None}
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
    record = next(iter(records.values()))
    axes.set_title(f"Decode step over GPUs\n{record.environment.gpu}, {record.shape}")
    figure.legend(loc="outside right upper")


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.engine.scaling", description=__doc__)
    parser.add_argument("records", nargs="+", type=Path, metavar="RECORD")
    parser.add_argument("--plots", type=Path, metavar="DIR", help="draw scaling.svg there")
    args = parser.parse_args(argv)

    def show() -> None:
        records = by_ranks([EngineResults.load(path) for path in args.records])
        print(align({"steps": table(records), "memory": tokens_table(records)}))
        if args.plots is not None:
            draw(args.plots, {"scaling": partial(plot, records)})

    return run(show)


if __name__ == "__main__":
    sys.exit(main())
