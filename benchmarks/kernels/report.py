"""The kernels' record as tables."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from benchmarks.common.record import TargetResult
from benchmarks.common.report import Table, align, environment_table, fill_sections
from benchmarks.kernels.cases import LABELS, SUITES
from benchmarks.kernels.record import CaseResult, Measurement, Results

_SHAPES = {"decode": "sequences x context", "write": "tokens", "prefill": "tokens after history"}


_BOUNDS = {"decode": "of read bandwidth", "write": "of copy bandwidth"}


def suite_table(results: Results, suite: str) -> Table:
    """Medians in µs by case and contender; rate, share and speedups of the first contender, ``saw_int4``."""
    cases = results.suite(suite)
    contenders = [c for c in LABELS if any(case.find(c) for case in cases)]
    peers = [c for c in ("flashinfer", "official") if c in contenders and "saw_int4" in contenders]
    rate = f"saw_int4 {'TFLOP/s' if suite == 'prefill' else 'GB/s'}"
    header = [_SHAPES[suite], *(f"{LABELS[c]} µs" for c in contenders), "saw_int4 p10 to p90", rate]
    header += [_BOUNDS[suite]] if suite in _BOUNDS else []
    header += [f"speedup over {LABELS[peer]}" for peer in peers]
    rows = [header]
    for case in cases:
        mine = case.find("saw_int4")
        row = [case.name, *(_time(case, c) for c in contenders)]
        row.append(_or_dash(mine, lambda m: f"{m.p10_us:.1f} to {m.p90_us:.1f}"))
        row.append(_or_dash(mine, lambda m: f"{m.tflops:.0f}" if m.tflops else f"{m.gbps:.0f}"))
        if suite in _BOUNDS:
            row.append(_or_dash(mine, lambda m: f"{100 * (m.share or 0):.1f} %"))
        for peer in peers:
            other = case.find(peer)
            row.append(f"{other.median_us / mine.median_us:.2f}x" if mine and other else "-")
        rows.append(row)
    return rows


def _or_dash(measurement: Measurement | None, text: Callable[[Measurement], str]) -> str:
    return text(measurement) if measurement else "-"


def _time(case: CaseResult, contender: str) -> str:
    m = case.find(contender)
    if m is None:
        return "-"
    text = f"{m.median_us:.1f}"
    text += f" ({m.detail})" if m.detail else ""
    return text if m.cuda_graph else f"{text} (no graph)"


def target_table(results: Results) -> Table:
    """Each target, what was measured, and whether it was met."""
    rows = [["suite", "case", "must", "measured", "met"]]
    for case in results.cases:
        for t in case.targets:
            measured = "not measured" if t.value is None else _value(t, t.value)
            met = "-" if t.met is None else "yes" if t.met else "no"
            rows.append([case.suite, case.name, _must(case, t), measured, met])
    return rows


def _value(target: TargetResult, value: float) -> str:
    if target.quantity == "time":
        return f"{value:.1f} µs"
    return f"{100 * value:.1f} %" if target.quantity == "share" else f"{value:.3f}x"


def _must(case: CaseResult, target: TargetResult) -> str:
    name = LABELS[target.contender]
    if target.quantity == "time":
        return f"{name}: at most {target.limit:g} µs"
    if target.quantity == "share":
        return f"{name}: at least {100 * target.limit:g} % {_BOUNDS[case.suite]}"
    other = LABELS[target.against or ""]
    if target.quantity == "ratio":
        return f"{name}: at most {target.limit:g}x the time of {other}"
    return f"{name}: at least {target.limit:g}x the speed of {other}"


def missing_lines(results: Results) -> list[str]:
    """Contenders and variants of them that were not measured: a line for each reason."""
    cases: dict[tuple[str, str, str], list[str]] = {}
    for case in results.cases:
        for contender, reason in case.missing.items():
            cases.setdefault((case.suite, contender, reason), []).append(case.name)
        for m in case.measurements:
            for variant, reason in m.failed.items():
                cases.setdefault((case.suite, m.contender, f"{variant}: {reason}"), []).append(case.name)
    return [
        f"{suite} {LABELS[contender]} ({', '.join(names)}): {reason}"
        for (suite, contender, reason), names in cases.items()
    ]


def _sections(results: Results) -> dict[str, Table]:
    tables = {"environment": environment_table(results)}
    tables |= {suite: suite_table(results, suite) for suite in SUITES if results.suite(suite)}
    return tables | {"targets": target_table(results)}


def plain(results: Results) -> str:
    """All tables with aligned columns."""
    text = align(_sections(results))
    if missing := missing_lines(results):
        text = "\n".join([text, "", "not measured", *missing])
    return text


def fill_in(document: Path, results: Results) -> None:
    """Replace what lies between a document's ``<!-- begin NAME -->`` and ``<!-- end NAME -->``.

    Parameters
    ----------
    document : Path
        Markdown with markers of ``environment``, ``targets`` and suites.
    results : Results

    Raises
    ------
    ConfigError
        If the document lacks the marker of a table.
    """
    fill_sections(document, _sections(results))
