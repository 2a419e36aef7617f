"""The record as tables and numbers."""

from __future__ import annotations

from benchmarks.common.report import Report, Table, environment_table
from benchmarks.streams.record import Row, StreamsResults

_NAMES = {
    "llm": "`LLM`",
    "triton_stream": "Triton, streams",
    "triton_whole": "Triton, whole answers",
    "saw_serve": "`saw-serve`, streams",
}


def table(results: StreamsResults) -> Table:
    """A row for each number of clients and way."""
    bare = {row.clients: row.tokens_per_s for row in results.rows if row.path == "llm"}
    rows = [
        ["clients", "by way of", "tokens/s", "of `LLM`", "responses/s", "first token ms p50", "p90", "CPU µs a token"]
    ]
    for r in sorted(results.rows, key=lambda r: r.clients):
        share = f"{r.tokens_per_s / bare[r.clients]:.2f}" if r.clients in bare else ""
        responses = "" if r.responses_per_s is None else f"{r.responses_per_s:,.0f}"
        times = [f"{ms:,.1f}" if ms < 100 else f"{ms:,.0f}" for ms in (r.first_ms_p50, r.first_ms_p90)]
        rows.append([f"{r.clients}", _NAMES[r.path], f"{r.tokens_per_s:,.0f}", share, responses, *times, _cpu(r)])
    return rows


def _cpu(row: Row) -> str:
    parts = {name: us for name, us in row.cpu_us_per_token.items() if us >= 0.5}
    shown = ", ".join(f"{name} {us:.1f}" for name, us in sorted(parts.items(), key=lambda part: -part[1]))
    return shown if len(parts) < 2 else f"{sum(parts.values()):.1f}: {shown}"


def report(results: StreamsResults) -> Report:
    """What the record says."""
    pace = (
        []
        if results.pace is None
        else [["pace", "{} ms a step, {} a sequence, {} a prompt token".format(*results.pace)]]
    )
    texts = (
        f"{results.output_tokens} tokens after prompts of {results.prompt_tokens}, {results.requests} of each client"
    )
    environment = environment_table(results.environment, ["engine of", results.model], *pace, ["texts", texts])
    cpu = f"{results.environment.cpu or 'unknown'}, {results.environment.cores} cores"
    numbers = {"cpu": cpu, "commit": results.environment.commit or "unknown", "command": results.environment.command}
    for r in results.rows:
        numbers[f"{r.path} {r.clients} first ms"] = f"{r.first_ms_p50:.1f}"
        numbers[f"{r.path} {r.clients} µs"] = f"{sum(r.cpu_us_per_token.values()):.1f}"
    return Report({"environment": environment, "streams": table(results)}, numbers)
