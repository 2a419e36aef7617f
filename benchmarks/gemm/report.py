"""The products' record as tables."""

from __future__ import annotations

from benchmarks.common.report import Report, Table, environment_table
from benchmarks.common.target import target_table
from benchmarks.gemm.record import LABELS, GemmResults


def report(results: GemmResults) -> Report:
    """What a record says."""
    targets = target_table(
        (((case.name, f"{case.rows:,}"), target) for case in results.cases for target in case.targets),
        ("weight", "rows"),
    )
    rates = [["weight", "rows", "contender", "µs", "p10 to p90", "launches", "GB/s", "of the read bandwidth", "error"]]
    for case in results.cases:
        for p in case.products:
            share = f"{100 * p.gbps / results.bandwidth.read_gbps:.1f} %"
            error = "-" if p.error is None else f"{p.error:.4f}"
            spread = f"{p.p10_us:.1f} to {p.p90_us:.1f}"
            row = [case.name, f"{case.rows:,}", LABELS[p.contender], f"{p.median_us:.1f}", spread, str(p.chained)]
            rates.append([*row, f"{p.gbps:.0f}", share, error])
    notes = sorted({f"{LABELS[name]}: {why}" for case in results.cases for name, why in case.missing.items()})
    environment = environment_table(
        results.environment,
        ["L2 before each run", results.flush],
        ["measured read bandwidth", f"{results.bandwidth.read_gbps:,.0f} GB/s"],
    )
    tables = {"products": times(results), "rates": rates, "targets": targets, "environment": environment}
    return Report(tables, {"commit": results.environment.commit or "unknown"}, notes=notes)


def times(results: GemmResults) -> Table:
    """Medians in µs by case and contender."""
    contenders = [name for name in LABELS if any(case.find(name) for case in results.cases)]
    table = [["weight", "rows", *(f"{LABELS[name]} µs" for name in contenders)]]
    for case in results.cases:
        found = [case.find(name) for name in contenders]
        cells = ["-" if p is None else f"{p.median_us:.1f}" + ("" if p.cuda_graph else " (no graph)") for p in found]
        table.append([f"{case.name}, {case.out_features} x {case.in_features}", f"{case.rows:,}", *cells])
    return table
