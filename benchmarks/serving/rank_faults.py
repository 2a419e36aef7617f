"""What becomes of requests when a rank of their engine is killed, stopped or slowed at random moments.

Every request must be answered with the text that it has without faults, or fail in one sentence; no block may be lost,
and the group must be back at the end. ``python -m benchmarks.serving.rank_faults --help``.
"""

from __future__ import annotations

import argparse
import os
import random
import signal
import threading
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from saw_trtllm import LLM, KvCacheConfig, SamplingParams
from saw_trtllm.errors import RankError

FAULTS = ("killed", "stopped", "slowed")


@dataclass
class Counts:
    """What became of the requests.

    Attributes
    ----------
    faults : Counter
        How often a rank was killed, stopped or slowed.
    answered, failed, other_texts : int
        Requests with their text, with one sentence, and with another text than without faults.
    restarts, lost_blocks : int
    restart_seconds : list of float
        From a fault until all ranks were there again.
    """

    faults: Counter[str] = field(default_factory=Counter)
    answered: int = 0
    failed: int = 0
    other_texts: int = 0
    restarts: int = 0
    lost_blocks: int = 0
    restart_seconds: list[float] = field(default_factory=list)


def run_with_faults(
    llm: LLM,
    prompts: Sequence[list[int]],
    params: Sequence[SamplingParams],
    expected: Sequence[list[int]],
    faults: Sequence[str],
    rank: int = 1,
    seed: int = 0,
    pause: tuple[float, float] = (0.0, 1.0),
) -> Counts:
    """Send all requests at once, and meanwhile one fault after the other to a rank.

    Parameters
    ----------
    llm : LLM
    prompts, params, expected
        The requests, and the tokens of their texts.
    faults : sequence of str
        Of :data:`FAULTS`. Requests are sent again, as new ones, until all faults have come.
    rank : int
    seed : int
        Of the moments.
    pause : tuple of float
        Least and most seconds between a group's return and the next fault.
    """
    counts = Counts()
    done = threading.Event()
    injector = threading.Thread(target=_inject, args=(llm, faults, rank, random.Random(seed), pause, counts, done))
    before = llm.stats().restarts_total
    injector.start()
    while not done.is_set():
        handles = [llm.generate_async(p, s) for p, s in zip(prompts, params, strict=True)]
        for handle, text in zip(handles, expected, strict=True):
            try:
                tokens = handle.result().outputs[0].token_ids
            except RankError:
                counts.failed += 1
            else:
                counts.answered += 1
                counts.other_texts += tokens != text
    injector.join()
    deadline = time.monotonic() + 60
    while (stats := llm.stats()).used_blocks and time.monotonic() < deadline:  # the last step is still in flight
        time.sleep(0.01)
    counts.restarts, counts.lost_blocks = stats.restarts_total - before, stats.used_blocks
    return counts


def _inject(
    llm: LLM,
    faults: Sequence[str],
    rank: int,
    moments: random.Random,
    pause: tuple[float, float],
    counts: Counts,
    done: threading.Event,
) -> None:
    for fault in faults:
        time.sleep(moments.uniform(*pause))
        pids = _pids(llm)
        begun = time.monotonic()
        if fault == "slowed":
            _slow_down(pids[rank], moments)
        else:
            os.kill(pids[rank], signal.SIGKILL if fault == "killed" else signal.SIGSTOP)
            while _pids(llm) == pids:
                time.sleep(0.01)
            counts.restart_seconds.append(time.monotonic() - begun)
        counts.faults[fault] += 1
    done.set()


def _pids(llm: LLM) -> list[int]:
    """The ranks' processes, once they are there."""
    while not (pids := llm.executor.pids):  # type: ignore[attr-defined]
        time.sleep(0.01)
    return pids


def _slow_down(pid: int, moments: random.Random) -> None:
    """Hold a process for a part of each of the next moments."""
    for _ in range(20):
        os.kill(pid, signal.SIGSTOP)
        time.sleep(moments.uniform(0, 0.04))
        os.kill(pid, signal.SIGCONT)
        time.sleep(0.01)


def main() -> None:
    """Run it on an engine, and print the counts."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--engine_dir", type=Path, required=True, help="an engine of saw-build --tp_size")
    parser.add_argument("--ranks", choices=("ray", "processes"), default="ray")
    parser.add_argument("--requests", type=int, default=500)
    parser.add_argument("--times", type=int, default=5, help="of each kind of fault")
    parser.add_argument("--retry", type=int, default=0)
    parser.add_argument("--step_timeout", type=float, default=10.0)
    parser.add_argument("--kv_cache_max_tokens", type=int, metavar="N", help="by default what the memory allows")
    args = parser.parse_args()
    cache = KvCacheConfig(max_tokens=args.kv_cache_max_tokens)
    parallel = {"ranks": args.ranks, "step_timeout": args.step_timeout}
    with LLM(args.engine_dir, kv_cache_config=cache, parallel_config=parallel, retry=args.retry) as llm:
        numbers = random.Random(1)
        vocab = llm.config.pretrained_config.vocab_size
        prompts = [[numbers.randrange(vocab) for _ in range(numbers.randint(4, 60))] for _ in range(args.requests)]
        params = [SamplingParams(max_tokens=16, ignore_eos=True) for _ in prompts]
        outputs = llm.generate(prompts, params)
        assert isinstance(outputs, list)
        expected = [output.outputs[0].token_ids for output in outputs]
        faults = list(FAULTS) * args.times
        print(run_with_faults(llm, prompts, params, expected, numbers.sample(faults, len(faults))))


if __name__ == "__main__":
    main()
