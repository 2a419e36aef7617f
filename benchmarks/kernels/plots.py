"""The kernels' record as plots."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING, Any

from benchmarks.kernels.cases import LABELS, LLAMA, PEERS
from benchmarks.kernels.record import CaseResult, Results
from saw_trtllm.format import KVFormat

if TYPE_CHECKING:
    from matplotlib.figure import Figure

#: Okabe and Ito's colours, which the colour-blind can tell apart, and markers for those who see none.
_STYLES = {
    "saw_int4": ("#0072B2", "o"),
    "saw_k8v4": ("#F0E442", "v"),
    "folded": ("#E69F00", "p"),
    "int4": ("#56B4E9", "s"),
    "bf16": ("#009E73", "^"),
    "xqa_fp8": ("#000000", "P"),
    "flashinfer_fp8": ("#000000", "X"),
    "xqa": ("#D55E00", "h"),
    "flashinfer": ("#D55E00", "D"),
    "official": ("#CC79A7", "v"),
}


_ROOFLINE = "#555555"


def plots(results: Results) -> dict[str, Callable[[Figure], None]]:
    """What draws ``decode``, ``write`` and ``prefill``: those whose suites are in the record."""
    every = {"decode": _decode, "write": _write, "prefill": _prefill}
    return {
        suite: partial(_on_axes, plot, results)
        for suite, plot in every.items()
        if any(case.measurements for case in results.suite(suite))
    }


def _on_axes(plot: Callable[[Any, Results], None], results: Results, figure: Figure) -> None:
    axes = figure.add_subplot()
    plot(axes, results)
    figure.legend(loc="outside right upper")


def _lines(axes: Any, cases: list[CaseResult], x: list[float], scale: float = 1.0, side_by_side: bool = False) -> None:
    """Medians over ``x``, with bars from p10 to p90; ``scale`` turns µs to the axis's unit.

    Where contenders stand ``side_by_side``, no line joins their cases.
    """
    shown = {c: style for c, style in _STYLES.items() if any(case.find(c) for case in cases)}
    for i, (contender, (colour, marker)) in enumerate(shown.items()):
        shift = 0.9 * ((i + 0.5) / len(shown) - 0.5) if side_by_side else 0.0
        found = [(at + shift, m) for at, case in zip(x, cases, strict=True) if (m := case.find(contender))]
        median = [m.median_us * scale for _, m in found]
        spread = [
            [(m.median_us - m.p10_us) * scale for _, m in found],
            [(m.p90_us - m.median_us) * scale for _, m in found],
        ]
        axes.errorbar(
            [at for at, _ in found],
            median,
            spread,
            fmt=marker + ("" if side_by_side else "-"),
            color=colour,
            markersize=5,
            linewidth=1.2,
            markerfacecolor="none" if contender in PEERS else colour,
            label=LABELS[contender],
        )


def _title(axes: Any, results: Results, text: str) -> None:
    axes.set_title(f"{text}\n{results.environment.gpu}, heads {LLAMA}")


def _decode(axes: Any, results: Results) -> None:
    """Time by shape, ordered by tokens; dashes are the time of reading the rows once."""
    cases = [c for c in results.suite("decode") if (c.num_heads, c.num_kv_heads, c.head_dim) == (32, 8, 128)]
    cases.sort(key=lambda c: (c.batch * (c.history + 1), c.batch))
    x = [float(i) for i in range(len(cases))]
    _lines(axes, cases, x, side_by_side=True)
    for kv, style in (("saw_int4", "-"), ("fp16", ":")):
        fmt = KVFormat(kv, LLAMA.head_dim)
        floors = [
            2 * c.batch * (c.history + 1) * c.num_kv_heads * fmt.row_bytes / results.bandwidth.read_gbps / 1e3
            for c in cases
        ]
        label = f"read bandwidth, rows of {fmt.row_bytes} B"
        axes.hlines(floors, [i - 0.45 for i in x], [i + 0.45 for i in x], color=_ROOFLINE, linestyle=style, label=label)
    axes.set_xticks(x, [c.name for c in cases], rotation=30, ha="right")
    axes.grid(axis="x", visible=False)
    axes.set_yscale("log")
    axes.yaxis.set_major_formatter("{x:g}")
    axes.set_xlabel("sequences x context")
    axes.set_ylabel("µs")
    _title(axes, results, "Decode attention against batch x context")


def _write(axes: Any, results: Results) -> None:
    """Time by tokens; the dashed line is the copy bandwidth."""
    cases = results.suite("write")
    x = [float(c.tokens) for c in cases]
    _lines(axes, cases, x)
    floor = [
        (c.tokens, m.bytes / results.bandwidth.copy_gbps / 1e3) for c in cases if (m := c.find("saw_int4")) is not None
    ]
    axes.plot(*zip(*floor, strict=True), color=_ROOFLINE, linestyle=":", label="copy bandwidth, bytes of saw_int4")
    axes.set_xscale("log", base=2)
    axes.set_xticks(x, [f"{c.tokens}" for c in cases])
    axes.set_yscale("log")
    axes.yaxis.set_major_formatter("{x:g}")
    axes.set_xlabel("tokens")
    axes.set_ylabel("µs")
    _title(axes, results, "KV write against tokens")


def _prefill(axes: Any, results: Results) -> None:
    """Time of a chunk by the history before it."""
    chunks = [c for c in results.suite("prefill") if c.tokens == 2048]
    _lines(axes, chunks, [c.history / 1024 for c in chunks], 1e-3)
    axes.set_xlabel("history, Ki tokens")
    axes.set_ylabel("ms")
    axes.set_ylim(bottom=0)
    _title(axes, results, "Prefill attention of 2048 tokens against history")
