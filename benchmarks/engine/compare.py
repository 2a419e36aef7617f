"""``python -m benchmarks.engine.compare FOLDER FOLDER``: decode steps of engines that are open at once, timed in turn.

For engines that differ in something else than their cache, as in their dtype: the clocks and the heat of one run are
theirs alike, which those of two runs are not.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from contextlib import ExitStack, closing
from pathlib import Path

from benchmarks.engine import cases
from saw_trtllm.cli.common import print_table, run
from saw_trtllm.engine.config import EngineConfig


def compare(folders: Sequence[Path], batches: Sequence[int], contexts: Sequence[int]) -> dict[str, str]:
    """µs of a step by batch and context, over the first engine's, and of the parts of the largest one."""
    from benchmarks.engine.clock import StreamClock
    from benchmarks.engine.steps import StepBench, measure
    from saw_trtllm.backends.tensorrt.executor import TensorRTExecutor

    rows = {"sequences x context": ", ".join(map(str, folders))}
    with ExitStack() as stack:
        benches = []
        for folder in folders:
            config = EngineConfig.load(folder)
            blocks = max(batches) * -(-max(contexts) // config.build_config.tokens_per_block)
            executor = TensorRTExecutor(folder, config, blocks * config.build_config.tokens_per_block, 1.0)
            stack.callback(executor.shutdown)
            benches.append(StepBench(executor, config, stack.enter_context(closing(StreamClock(executor.stream)))))
        for batch in batches:
            for context in contexts:
                times = [step.median_us for step in measure(benches, batch, context)]
                rows[f"{batch}x{context}"] = ", ".join(f"{t:.0f} µs ({t / times[0]:.4f}x)" for t in times)
        parts = [bench.profile(batches[-1], contexts[-1]).parts for bench in benches]
        for part, words in cases.PARTS.items():
            rows[words] = ", ".join(f"{found.get(part, 0):.0f} µs" for found in parts)
    return rows


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.engine.compare", description=__doc__.splitlines()[0])
    parser.add_argument("folders", type=Path, nargs="+", metavar="FOLDER", help="engines of saw-build")
    for name, default in (("batch", "1,64"), ("context", "1024,8192")):
        parser.add_argument(f"--{name}", default=default, metavar="N,N", help="comma-separated (default: %(default)s)")
    args = parser.parse_args(argv)

    def compare_them() -> None:
        batches = cases.parse_numbers(args.batch, cases.BATCHES, "--batch")
        contexts = cases.parse_numbers(args.context, cases.CONTEXTS, "--context")
        print_table(compare(args.folders, batches, contexts))

    return run(compare_them)


if __name__ == "__main__":
    sys.exit(main())
