"""Tables of an engine record: plain for a terminal, Markdown between a document's markers."""

from __future__ import annotations

from benchmarks.common.report import Report, Table, environment_table
from benchmarks.common.target import target_table
from benchmarks.engine.cases import PARTS
from benchmarks.engine.plots import plots
from benchmarks.engine.record import EngineResults


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


def peer_table(results: EngineResults) -> Table:
    """µs of the steps that peers were measured in, ours first, and ``saw_int4``'s tokens/s over each peer's."""
    ours = [e for kv in ("saw_int4", "fp16") if (e := results.engine(kv))]
    labels = [f"{peer.name} {peer.kv}" for peer in results.peers]
    header = [*(e.kv for e in ours), *labels]
    rows = [["sequences x context", *(f"{x} µs" for x in header), *(f"saw_int4 over {x}" for x in labels)]]
    for batch, context in sorted({(s.batch, s.context) for peer in results.peers for s in peer.steps}):
        mine = [e.find(batch, context) for e in ours]
        theirs = [peer.find(batch, context) for peer in results.peers]
        over = [results.over_peer(peer).get((batch, context)) for peer in results.peers]
        row = [f"{batch}x{context}", *("-" if s is None else f"{s.median_us:.0f}" for s in mine)]
        row += ["-" if s is None else f"{s.step_us:.0f}" for s in theirs]
        rows.append([*row, *("-" if x is None else f"{x:.2f}x" for x in over)])
    return rows


def _grid(cells: dict[tuple[int, int], str], what: str) -> Table:
    contexts = sorted({context for _, context in cells})
    rows = [[f"{what}: sequences x context", *(f"{context}" for context in contexts)]]
    for batch in sorted({batch for batch, _ in cells}):
        rows.append([f"{batch}", *(cells.get((batch, context), "-") for context in contexts)])
    return rows


def part_table(results: EngineResults) -> Table:
    """Parts of a step and their shares, its layers timed one by one, and the host's part that a step alone shows."""
    there = {part for e in results.engines for p in e.profiles for part in p.parts}
    known = {part: words for part, words in PARTS.items() if part in there}
    columns = [*known.values(), "host, not overlapped"]
    rows = [["KV cache", "sequences x context", *(f"{words} µs" for words in columns)]]
    for e in results.engines:
        for p in e.profiles:
            total = sum(p.parts.values())
            parts = [p.parts.get(part, 0.0) for part in known]
            step = e.find(p.batch, p.context)
            host = "-" if step is None else f"{step.alone_us - step.gpu_us:.0f}"
            shares = [f"{us:.0f} ({100 * us / total:.0f} %)" for us in parts]
            rows.append([e.kv, f"{p.batch}x{p.context}", *shares, host])
    return rows


def _numbers(results: EngineResults) -> dict[str, str]:
    numbers = {"commit": results.environment.commit or "unknown"}
    for e in results.engines:
        for s in e.steps:
            numbers[f"{e.kv} {s.batch}x{s.context} µs"] = f"{s.median_us:.0f}"
            numbers[f"{e.kv} {s.batch}x{s.context} tokens/s"] = f"{s.tokens_per_second:,.0f}"
    for (batch, context), speedup in results.speedups("fp16").items():
        numbers[f"{batch}x{context} over fp16"] = f"{speedup:.2f}x"
    for peer in results.peers:
        name = f"{peer.name.split()[0]} {peer.kv}"
        for step in peer.steps:
            numbers[f"{name} {step.batch}x{step.context} µs"] = f"{step.step_us:.0f}"
        for (batch, context), speedup in results.over_peer(peer).items():
            numbers[f"{batch}x{context} over {name}"] = f"{speedup:.2f}x"
    return numbers


def report(results: EngineResults) -> Report:
    """What the record says."""
    level = "its default" if results.optimization_level is None else f"{results.optimization_level}"
    profiles = "one of their own for decodes" if results.decode_profile else "one for all steps"
    gemms = f"SawGemm in {results.gemm_plugin}" if results.gemm_plugin else "TensorRT's own"
    build = f"optimization level {level}, {profiles}, {results.tokens_per_block} tokens a block, GEMMs: {gemms}"
    tables = {
        "environment": environment_table(results.environment, ["model", str(results.shape)], ["build", build]),
        "engines": engine_table(results),
        "steps": step_table(results),
        "over_fp16": ratio_table(results, "fp16"),
        "over_int4": ratio_table(results, "int4"),
        **({"peers": peer_table(results)} if results.peers else {}),
        "parts": part_table(results),
        "runtime": loop_table(results),
        "targets": target_table(((), t) for t in results.targets),
    }
    return Report(tables, _numbers(results), plots(results))
