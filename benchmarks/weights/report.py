"""The weights' record as a table."""

from __future__ import annotations

from benchmarks.common.report import Report, environment_table
from benchmarks.weights.record import Divergence, WeightsResults


def report(results: WeightsResults) -> Report:
    """What a record says."""
    rows = [
        ["model", "weights", "KL, saw_trtllm", "KL, transformers", "difference of KL", "top-1", "top-1, transformers"]
    ]
    rounded = [["model", "inputs in 16 bits", "in 8 bits", "top-1", "top-1 in 8 bits"]]
    for m in results.models:
        difference = f"{m.kl_difference:+.6f} ± {m.kl_difference_error:.6f}"
        rows.append([m.name, m.weights, _kl(m.ours), _kl(m.theirs), difference, _top1(m.ours), _top1(m.theirs)])
        if m.w8a8 is not None:
            rounded.append([m.name, _kl(m.ours), _kl(m.w8a8), _top1(m.ours), _top1(m.w8a8)])
    environment = environment_table(
        results.environment,
        ["original", results.model],
        ["tokens", f"{results.num_tokens:,} in windows of {results.window}"],
    )
    return Report(
        {"divergence": rows, "inputs": rounded, "environment": environment}, {"tokens": f"{results.num_tokens:,}"}
    )


def _kl(d: Divergence) -> str:
    return f"{d.kl:.4f} ± {d.kl_error:.4f}"


def _top1(d: Divergence) -> str:
    return f"{100 * d.top1:.1f} ± {100 * d.top1_error:.1f} %"
