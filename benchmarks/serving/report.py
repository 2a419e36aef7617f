"""The serving record as a table and numbers."""

from __future__ import annotations

from benchmarks.common.report import Report, Table, environment_table
from benchmarks.serving.record import ServingResults

_HEADER = ["KV cache", "clients", "requests/s", "tokens/s", "first token ms p50", "p90", "request ms p50", "p90"]


def load_table(results: ServingResults) -> Table:
    """A row for each engine and concurrency."""
    rows = [_HEADER]
    for r in sorted(results.rows, key=lambda r: r.kv):
        times = (r.first_ms_p50, r.first_ms_p90, r.request_ms_p50, r.request_ms_p90)
        rates = [f"{r.requests_per_s:.1f}", f"{r.tokens_per_s:,.0f}"]
        rows.append([r.kv, f"{r.concurrency}", *rates, *(f"{ms:,.1f}" if ms < 100 else f"{ms:,.0f}" for ms in times)])
    return rows


def report(results: ServingResults) -> Report:
    """What the record says."""
    prompts = "beginnings of Python" if results.prompt_words is None else f"{results.prompt_words} random words"
    texts = f"{results.output_tokens} tokens, {'streamed' if results.stream else 'in one piece'}"
    environment = environment_table(
        results.environment, ["engines of", results.model], ["prompts", prompts], ["texts", texts]
    )
    rates: dict[str, list[str]] = {}
    for r in results.rows:
        rates.setdefault(f"{r.kv} {r.concurrency} tokens/s", []).append(f"{r.tokens_per_s:,.0f}")
    numbers = {name: " and ".join(values) for name, values in rates.items()}
    numbers["commit"] = results.environment.commit or "unknown"
    return Report({"environment": environment, "load": load_table(results)}, numbers)
