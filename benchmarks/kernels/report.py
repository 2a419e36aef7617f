"""The kernels' record as tables."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from benchmarks.common.report import Report, Table, environment_table
from benchmarks.common.target import target_table
from benchmarks.kernels.cases import BOUNDS, FP8_PEERS, LABELS, SUITES
from benchmarks.kernels.plots import plots
from benchmarks.kernels.record import CaseResult, Measurement, Results

_SHAPES = {"decode": "sequences x context", "write": "tokens", "prefill": "tokens after history"}
_SHAPES["layers"] = _SHAPES["decode"]


def suite_table(results: Results, suite: str) -> Table:
    """Medians in µs by case and contender; rate, share and speedups of the first contender, ``saw_int4``.

    The fp8 peer is the fastest of those that cache in 8 bits.
    """
    cases = results.suite(suite)
    contenders = [c for c in LABELS if any(case.find(c) for case in cases)]
    rivals = {"the fp8 peer": FP8_PEERS, LABELS["flashinfer"]: ("flashinfer",), LABELS["official"]: ("official",)}
    shown = set(contenders) if "saw_int4" in contenders else set()
    rivals = {label: names for label, names in rivals.items() if shown.intersection(names)}
    rate = f"saw_int4 {'TFLOP/s' if suite == 'prefill' else 'GB/s'}"
    header = [_SHAPES[suite], *(f"{LABELS[c]} µs" for c in contenders), "saw_int4 p10 to p90", rate]
    header += [BOUNDS[suite]] if suite in BOUNDS else []
    header += [f"speedup over {label}" for label in rivals]
    rows = [header]
    for case in cases:
        mine = case.find("saw_int4")
        row = [case.name, *(_time(case, c) for c in contenders)]
        row.append(_or_dash(mine, lambda m: f"{m.p10_us:.1f} to {m.p90_us:.1f}"))
        row.append(_or_dash(mine, lambda m: f"{m.tflops:.0f}" if m.tflops else f"{m.gbps:.0f}"))
        if suite in BOUNDS:
            row.append(_or_dash(mine, lambda m: f"{100 * (m.share or 0):.1f} %"))
        for names in rivals.values():
            best = fastest(case, names)
            row.append(f"{best / mine.median_us:.2f}x" if mine and best else "-")
        rows.append(row)
    return rows


def fastest(case: CaseResult, contenders: Sequence[str]) -> float | None:
    """The least median of some contenders in µs."""
    return min((m.median_us for c in contenders if (m := case.find(c))), default=None)


def _or_dash(measurement: Measurement | None, text: Callable[[Measurement], str]) -> str:
    return text(measurement) if measurement else "-"


def _time(case: CaseResult, contender: str) -> str:
    m = case.find(contender)
    if m is None:
        return "-"
    text = f"{m.median_us:.1f}"
    text += f" ({m.detail})" if m.detail else ""
    return text if m.cuda_graph else f"{text} (no graph)"


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


def _numbers(results: Results) -> dict[str, str]:
    bandwidth = results.bandwidth
    numbers = {"read GB/s": f"{bandwidth.read_gbps:.0f}", "copy GB/s": f"{bandwidth.copy_gbps:.0f}"}
    numbers["commit"] = results.environment.commit or "unknown"
    for case in results.cases:
        for m in case.measurements:
            numbers[f"{case.suite} {case.name} {m.contender} µs"] = f"{m.median_us:.0f}"
        mine, peer = case.find("saw_int4"), fastest(case, FP8_PEERS)
        if mine and peer:
            numbers[f"{case.suite} {case.name} fp8 peer µs"] = f"{peer:.0f}"
            numbers[f"{case.suite} {case.name} over the fp8 peer"] = f"{peer / mine.median_us:.2f}x"
    return numbers


def report(results: Results) -> Report:
    """What the record says."""
    bandwidth = results.bandwidth
    environment = environment_table(
        results.environment,
        ["read bandwidth", f"{bandwidth.read_gbps:.0f} GB/s (sum over 4 GiB)"],
        ["copy bandwidth", f"{bandwidth.copy_gbps:.0f} GB/s (copy of 4 GiB, read and written)"],
        ["before each run", results.flush],
    )
    tables = {"environment": environment}
    tables |= {suite: suite_table(results, suite) for suite in SUITES if results.suite(suite)}
    targets = [((case.suite, case.name), t) for case in results.cases for t in case.targets]
    tables["targets"] = target_table(targets, ("suite", "case"))
    missing = missing_lines(results)
    return Report(tables, _numbers(results), plots(results), ["not measured", *missing] if missing else [])
