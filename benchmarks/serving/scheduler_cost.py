"""What a step costs the scheduler and the block manager: decodes of many sequences over a pool full of found blocks.

A step is scheduled while the one before it is in flight, as over a GPU. Times are wall time, so the machine is to be
quiet, or the process to come first:

    chrt -f 20 python -m benchmarks.serving.scheduler_cost --sequences 256 --registered 1000000
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from itertools import count

import numpy as np

from saw_trtllm.runtime.block_manager import BlockManager
from saw_trtllm.runtime.block_table import Content
from saw_trtllm.runtime.sampling_params import SamplingParams
from saw_trtllm.runtime.scheduler import Scheduler
from saw_trtllm.runtime.sequence import Scheduled, Sequence

_SIZE, _PROMPT, _CONVERSATION = 64, 1000, 32  # tokens of a block and of a prompt, blocks of a cached conversation


def filled(registered: int, free: int) -> BlockManager:
    """A pool of ``registered`` blocks that can be found, in conversations, and so many that cannot."""
    blocks, tokens = BlockManager(registered + free, _SIZE), np.arange(_SIZE, dtype=np.int32)
    parent = b""
    for i, index in enumerate(taken := blocks.take(registered)):
        key = i.to_bytes(32, "little")
        parent = (i + registered).to_bytes(32, "little") if i % _CONVERSATION == 0 else parent
        blocks.publish(index, Content(key, parent, tokens.copy()))
        parent = key
    for index in taken:
        blocks.release(index)
    return blocks


def measure(sequences: int, registered: int, steps: int) -> dict[str, float]:
    """Microseconds of a step: the least, the median and the mean, in which are those that take new blocks."""
    longest = _PROMPT + 16 * steps
    needed = sequences * (-(-(_PROMPT + 2 * steps) // _SIZE) + 1)
    blocks = filled(max(registered, needed), sequences)
    scheduler = Scheduler(blocks, sequences, sequences + 8192, 512, True)
    params = SamplingParams(max_tokens=longest - _PROMPT, ignore_eos=True)
    for i in range(sequences):
        # Different lengths, so that each step takes a few new blocks and no step takes one for all.
        scheduler.add(Sequence(i, [i] * (_PROMPT - i % _SIZE), params))
    times: list[float] = []
    in_flight: list[Scheduled] = []
    for step in count():
        start = time.perf_counter()
        parts = scheduler.schedule()
        scheduler.launched(parts)
        scheduler.advance(in_flight)
        spent = time.perf_counter() - start
        for part in in_flight:
            if part.samples:
                part.sequence.generated.append(0)
        in_flight = parts
        if len(scheduler.running) == sequences and all(p.samples for p in parts):
            times.append(spent * 1e6)
        if len(times) == steps or step > 10 * steps:
            break
    return {
        "min_us": round(min(times), 1),
        "median_us": round(statistics.median(times), 1),
        "mean_us": round(statistics.fmean(times), 1),
    }


def main() -> int:
    """Run it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sequences", type=int, default=256, metavar="N")
    parser.add_argument("--registered", type=int, default=1_000_000, metavar="N", help="blocks that can be found")
    parser.add_argument("--steps", type=int, default=1000, metavar="N")
    args = parser.parse_args()
    print(json.dumps(vars(args) | measure(args.sequences, args.registered, args.steps)))
    return 0


if __name__ == "__main__":
    sys.exit(main())
