"""``python -m benchmarks.engine.moving FOLDER``: decode steps while blocks move to the host and back, and without.

Blocks that no sequence holds are copied both ways beside the steps, at a given rate, as the host's tier copies them.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from statistics import median

from saw_trtllm import LLM, KvCacheConfig, SamplingParams
from saw_trtllm.cli.common import print_table, run
from saw_trtllm.engine.step import DECODE, StepPacker, StepSequence
from saw_trtllm.errors import ConfigError
from saw_trtllm.runtime.host_cache import BlockCopy, PendingTransfer
from saw_trtllm.runtime.sampling import SamplingState

#: Blocks that are copied to the host at a time, once a step, and as many back.
_BLOCKS = 64
_ROUNDS = 3


class Mover:
    """Copies blocks at a rate, some at a time."""

    def __init__(self, llm: LLM, first: int, gb_per_s: float) -> None:
        self._executor, self._block_bytes = llm.executor, llm.stats().block_bytes
        self._stores = [BlockCopy(first + i, i) for i in range(_BLOCKS)]
        self._loads = [BlockCopy(first + _BLOCKS + i, _BLOCKS + i) for i in range(_BLOCKS)]
        self._bytes_per_s = gb_per_s * 1e9
        self._pending: PendingTransfer | None = None
        self._start = time.perf_counter()
        self.moved = 0

    def move(self) -> None:
        """Begin the next copies, if it is time and the last ones are made."""
        due = (time.perf_counter() - self._start) * self._bytes_per_s
        if self.moved < due and (self._pending is None or self._pending.done()):
            self._pending = self._executor.transfer(self._stores, self._loads)
            self.moved += 2 * _BLOCKS * self._block_bytes

    @property
    def gb_per_s(self) -> float:
        """What has been moved so far."""
        return self.moved / (time.perf_counter() - self._start) / 1e9

    def end(self) -> None:
        """Wait for the last copies."""
        if self._pending is not None:
            self._pending.wait()


def measure(llm: LLM, batch: int, context: int, gb_per_s: float, steps: int) -> dict[str, float]:
    """µs of a step, median over rounds in turn: without copies, with them, and GB/s that were moved."""
    size, layout = llm.config.build_config.tokens_per_block, llm.config.pool_layout
    blocks = -(-(context + steps + 1) // size)
    used = batch * blocks * layout.num_tables
    if used + 2 * _BLOCKS > llm.stats().max_blocks:
        raise ConfigError(f"the KV cache has {llm.stats().max_blocks} blocks: give it more, or fewer sequences")
    if (held := llm.executor.num_host_blocks) < 2 * _BLOCKS:
        raise ConfigError(f"the host holds {held} blocks and {2 * _BLOCKS} are moved: give more --host_cache_size")
    while llm.executor.num_ready_host_blocks < 2 * _BLOCKS:
        time.sleep(0.01)
    tables = [layout.entries(range(i * blocks, (i + 1) * blocks)) for i in range(batch)]
    times: dict[bool, list[float]] = {False: [], True: []}
    rates = []
    for _ in range(_ROUNDS):
        for moving in times:
            mover = Mover(llm, used, gb_per_s) if moving else None
            times[moving] += _steps(llm, tables, context, steps, mover)
            if mover is not None:
                rates.append(mover.gb_per_s)
                mover.end()
    alone, beside = (1e6 * median(times[moving]) for moving in (False, True))
    return {"alone_us": alone, "moving_us": beside, "ratio": beside / alone, "gb_per_s": median(rates)}


def _steps(llm: LLM, tables: list[list[int]], context: int, steps: int, mover: Mover | None) -> list[float]:
    """Seconds of each step, the next one being launched before its result is taken where the executor lets it."""
    params = SamplingParams(max_tokens=1, ignore_eos=True)
    packer = StepPacker(llm.config.pool_layout)
    pending, times, last = [], [], time.perf_counter()
    for step in range(steps):
        parts = [StepSequence([1], context + step, context, DECODE, table) for table in tables]
        states = [SamplingState(params, [], [], (), 0) for _ in parts]
        if mover is not None:
            mover.move()
        pending.append(llm.executor.launch(packer.pack(parts), states, [False] * len(parts)))
        if len(pending) > int(llm.executor.asynchronous):
            pending.pop(0).result()
            now = time.perf_counter()
            times.append(now - last)
            last = now
    for left in pending:
        left.result()
    return times[1:]


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.engine.moving", description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path, metavar="FOLDER", help="an engine of saw-build")
    parser.add_argument("--batch", type=int, default=64, metavar="N", help="default: %(default)s")
    parser.add_argument("--context", type=int, default=8192, metavar="N", help="default: %(default)s")
    parser.add_argument("--gb_per_s", type=float, default=20.0, metavar="N", help="default: %(default)s")
    parser.add_argument("--steps", type=int, default=100, metavar="N", help="of a round (default: %(default)s)")
    parser.add_argument("--max_tokens", type=int, metavar="N", help="of the KV cache; by default what fits")
    parser.add_argument("--host_cache_size", type=int, default=1 << 30, metavar="BYTES", help="default: %(default)s")
    args = parser.parse_args(argv)

    def time_them() -> None:
        if min(args.batch, args.context, args.steps - 2) < 1:
            raise ConfigError("--batch and --context must be at least 1, and --steps 3")
        cache = KvCacheConfig(args.max_tokens, host_cache_size=args.host_cache_size)
        with LLM(args.folder, kv_cache_config=cache) as llm:
            found = measure(llm, args.batch, args.context, args.gb_per_s, args.steps)
        print_table({name: f"{value:.3f}" for name, value in found.items()})

    return run(time_them)


if __name__ == "__main__":
    sys.exit(main())
