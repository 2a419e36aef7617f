"""Tables of an engine record: plain for a terminal, Markdown between a document's markers."""

from __future__ import annotations

from pathlib import Path

from benchmarks.common.report import Table, align, fill_sections
from benchmarks.engine.cases import PARTS
from benchmarks.engine.record import EngineResults


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
    """µs of decode steps, of ``saw_int4`` if it was measured: a row for each batch, a column for each context."""
    engine = results.engine("saw_int4") or next(iter(results.engines), None)
    steps = [] if engine is None else engine.steps
    return _grid({(s.batch, s.context): f"{s.median_us:.0f}" for s in steps}, f"{engine.kv if engine else ''} µs")


def ratio_table(results: EngineResults, over: str) -> Table:
    """``saw_int4``'s tokens/s over another format's, likewise."""
    return _grid({case: f"{x:.3f}x" for case, x in results.speedups(over).items()}, f"over {over}")


def _grid(cells: dict[tuple[int, int], str], what: str) -> Table:
    contexts = sorted({context for _, context in cells})
    rows = [[f"{what}: sequences x context", *(f"{context}" for context in contexts)]]
    for batch in sorted({batch for batch, _ in cells}):
        rows.append([f"{batch}", *(cells.get((batch, context), "-") for context in contexts)])
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
        "over_fp16": ratio_table(results, "fp16"),
        "over_int4": ratio_table(results, "int4"),
        "parts": part_table(results),
        "runtime": loop_table(results),
        "targets": target_table(results),
    }


def plain(results: EngineResults) -> str:
    """All tables with aligned columns."""
    return align(_sections(results))


def fill_in(document: Path, results: EngineResults) -> None:
    """Write the tables between a document's markers; raises as :func:`benchmarks.kernels.report.fill_in`."""
    fill_sections(document, _sections(results))
