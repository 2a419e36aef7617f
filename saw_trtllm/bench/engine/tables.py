"""Tables of an engine record: plain for a terminal, Markdown between a document's markers."""

from __future__ import annotations

from pathlib import Path

from saw_trtllm.bench.engine.cases import KVS, PARTS
from saw_trtllm.bench.engine.record import EngineResults
from saw_trtllm.bench.tables import Table, align, fill_sections


def environment_table(results: EngineResults) -> Table:
    """Where the record came from, and what was built."""
    e = results.environment
    level = "its default" if results.optimization_level is None else f"{results.optimization_level}"
    profiles = "one of their own for decodes" if results.decode_profile else "one for all steps"
    gemms = f"SawGemm in {results.gemm_plugin}" if results.gemm_plugin else "TensorRT's own"
    return [
        ["what", "value"],
        ["GPU", e.gpu],
        ["driver, CUDA", f"{e.driver or 'unknown'}, {e.cuda}"],
        ["TensorRT, Python", f"{e.tensorrt}, {e.python}"],
        ["saw_trtllm", f"{e.saw_trtllm}, commit {e.commit or 'unknown'}{', with changes' if e.dirty else ''}"],
        ["model", str(results.shape)],
        ["build", f"optimization level {level}, {profiles}, {results.tokens_per_block} tokens a block, GEMMs: {gemms}"],
        ["date", e.date],
        ["command", f"`{e.command}`"],
    ]


def engine_table(results: EngineResults) -> Table:
    """What each engine is: build, sizes, start."""
    header = ["KV cache", "build s", "engine GiB", "bytes a token", "tokens that fit", "start s", "reading the file s"]
    rows = [header]
    for e in results.engines:
        start = e.start_up
        rows.append(
            [
                e.kv,
                "-" if e.build_s is None else f"{e.build_s:.1f}",
                f"{e.engine_bytes / 2**30:.2f}",
                f"{e.bytes_per_token:,}",
                f"{e.tokens:,}",
                *(["-", "-"] if start is None else [f"{start.open_s:.1f}", f"{start.read_s:.1f}"]),
            ]
        )
    return rows


def loop_table(results: EngineResults) -> Table:
    """The whole runtime: a token of each of many requests, and the GPU's share of its time."""
    rows = [["KV cache", "requests x context", "step µs", "GPU's part µs", "GPU busy"]]
    for e in results.engines:
        if (loop := e.loop) is not None:
            times = [f"{loop.step_us:.0f}", f"{loop.gpu_us:.0f}", f"{100 * loop.busy:.1f} %"]
            rows.append([e.kv, f"{loop.batch}x{loop.context}", *times])
    return rows


def step_table(results: EngineResults) -> Table:
    """Decode steps by batch and context."""
    kvs = [kv for kv in KVS if results.engine(kv)]
    header = ["sequences x context", *(f"{kv} µs" for kv in kvs), "saw_int4 p10 to p90", "saw_int4 tokens/s"]
    header += ["over fp16", "over int4"]
    rows = [header]
    for case in sorted({(s.batch, s.context) for e in results.engines for s in e.steps}):
        found = {kv: engine.find(*case) for kv in kvs if (engine := results.engine(kv)) is not None}
        ours = found.get("saw_int4")
        row = [f"{case[0]}x{case[1]}", *(f"{step.median_us:.0f}" if step else "-" for step in found.values())]
        row += [f"{ours.p10_us:.0f} to {ours.p90_us:.0f}", f"{ours.tokens_per_second:,.0f}"] if ours else ["-", "-"]
        for over in ("fp16", "int4"):
            ratio = results.speedups(over).get(case)
            row.append("-" if ratio is None else f"{ratio:.3f}x")
        rows.append(row)
    return rows


def part_table(results: EngineResults) -> Table:
    """Parts of a step and their shares, its layers timed one by one, and the host's part that a step alone shows."""
    rows = [["KV cache", "sequences x context", *(f"{words} µs" for words in PARTS.values()), "host, alone µs"]]
    for e in results.engines:
        for p in e.profiles:
            total = sum(p.parts.values())
            parts = [p.parts.get(part, 0.0) for part in PARTS]
            step = e.find(p.batch, p.context)
            host = "-" if step is None else f"{step.alone_us - step.gpu_us:.0f}"
            shares = [f"{us:.0f} ({100 * us / total:.0f} %)" for us in parts]
            rows.append([e.kv, f"{p.batch}x{p.context}", *shares, host])
    return rows


def target_table(results: EngineResults) -> Table:
    """Each target, what was measured, and whether it was met."""
    rows = [["must", "measured", "met"]]
    for t in results.targets:
        met = "-" if t.met is None else "yes" if t.met else "no"
        rows.append([t.name, "not measured" if t.value is None else f"{t.value:.3f}", met])
    return rows


def _sections(results: EngineResults) -> dict[str, Table]:
    return {
        "environment": environment_table(results),
        "engines": engine_table(results),
        "steps": step_table(results),
        "parts": part_table(results),
        "runtime": loop_table(results),
        "targets": target_table(results),
    }


def plain(results: EngineResults) -> str:
    """All tables with aligned columns."""
    return align(_sections(results))


def fill_in(document: Path, results: EngineResults) -> None:
    """Write the tables between a document's markers; raises as :func:`saw_trtllm.bench.tables.fill_in`."""
    fill_sections(document, _sections(results))
