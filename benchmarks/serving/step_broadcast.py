"""How long a step takes from the leader to all ranks of this machine.

``python -m benchmarks.serving.step_broadcast --help``

Sequences of 6400 tokens and more decode, as over a GPU: a step is sent while the one before it runs, and then the
result of that one is waited for. Of each step: the leader packs it, sends it, and each rank unpacks it; all clocks are
the machine's.
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import shlex
import sys
import time
from collections import deque
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

import numpy as np

from benchmarks.common.environment import cpu_name, describe
from benchmarks.common.record import Record, RecordPart, check_writable
from saw_trtllm.cli.common import print_table, run
from saw_trtllm.engine.step import DECODE, PoolLayout, StepPacker, StepSequence
from saw_trtllm.parallel.channel import LeaderChannel, RankChannel
from saw_trtllm.parallel.codec import StepDecoder, StepEncoder
from saw_trtllm.runtime.door import Address
from saw_trtllm.runtime.sampling import SamplingState
from saw_trtllm.runtime.sampling_params import SamplingParams

_LAYERS, _START, _BLOCK = 32, 6400, 32
_PARTS = {
    "pack": "the leader packs it",
    "send": "from there to the last rank",
    "unpack": "the slowest rank unpacks it",
    "whole": "from the first to the last",
}


class Span(RecordPart):
    """µs of a part of a step, the last rank's."""

    p50_us: float
    p99_us: float


class StepBroadcastResults(Record):
    """A run."""

    kind: Literal["step_broadcast"] = "step_broadcast"
    ranks: int
    sequences: int
    steps: int
    step_us: float
    """Of the GPU whose part is played."""
    priority: str
    """Of the processes' scheduling."""
    message_bytes: int
    """Of a step without new blocks."""
    spans: dict[str, Span]


def _rank(address: Address, rank: int, size: int, step_seconds: float) -> None:
    """Receive and unpack; what stands for the GPU ends a step so many seconds after its launch or the step before."""
    channel, decoder = RankChannel(address, rank, size), StepDecoder(PoolLayout([_LAYERS]))
    stamps: deque[tuple[int, int, float]] = deque()
    end = 0.0
    while True:
        _, command, body = channel.receive()
        arrived = time.monotonic_ns()
        if command == "close":
            return
        if command == "launch":
            decoder.decode(body)
            end = max(end, time.monotonic()) + step_seconds
            stamps.append((arrived, time.monotonic_ns(), end))
        else:
            arrived, unpacked, ready = stamps.popleft()
            time.sleep(max(0.0, ready - time.monotonic()))
            channel.say((arrived, unpacked))


class _Decodes:
    """The steps of sequences that decode."""

    def __init__(self, sequences: int) -> None:
        self._packer, self._params = StepPacker(PoolLayout([_LAYERS])), SamplingParams(seed=1, temperature=1.0)
        self._tables = [list(range(i * 1000, i * 1000 + _START // _BLOCK + 1)) for i in range(sequences)]
        self._texts: list[list[int]] = [[] for _ in self._tables]

    def step(self, number: int) -> tuple:
        """The arguments of a launch; of all sequences one in 32 has a block more."""
        for i, table in enumerate(self._tables):
            if (number + i) % _BLOCK == 0:
                table.append(table[-1] + 1)
        parts = [StepSequence([-1 - i], _START + number, 100, DECODE, table) for i, table in enumerate(self._tables)]
        states = [SamplingState(self._params, [], text, (), number) for text in self._texts]
        return self._packer.pack(parts), states, [False] * len(parts)


def measure(ranks: int, sequences: int, steps: int, step_seconds: float) -> tuple[dict[str, np.ndarray], int]:
    """Microseconds of each part of each step, and bytes of the smallest message."""
    leader, context = LeaderChannel(ranks), multiprocessing.get_context("spawn")
    processes = [
        context.Process(target=_rank, args=(leader.address, rank, ranks, step_seconds)) for rank in range(ranks)
    ]
    for process in processes:
        process.start()
    while not leader.accept(1.0):
        pass
    leader.begin(60.0)
    decodes, encoder = _Decodes(sequences), StepEncoder(PoolLayout([_LAYERS]))
    times: dict[str, list[int]] = {name: [] for name in _PARTS}
    sent: deque[tuple[int, int]] = deque()
    smallest = sys.maxsize
    for number in range(steps):
        step = decodes.step(number)
        begun = time.monotonic_ns()
        message = encoder.encode(*step)
        packed = time.monotonic_ns()
        leader.send("launch", message)
        sent.append((begun, packed))
        smallest = min(smallest, len(message))
        if len(sent) < 2:
            continue
        leader.send("take")
        answers: list[tuple[int, int]] = []
        while len(answers) < ranks:
            answers += [content for _, _, content in leader.receive(5.0)]
        begun, packed = sent.popleft()
        arrived, unpacked = (max(answer[i] for answer in answers) for i in (0, 1))
        spans = (packed - begun, arrived - packed, max(b - a for a, b in answers), unpacked - begun)
        for name, span in zip(times, spans, strict=True):
            times[name].append(span)
    leader.send("close")
    for process in processes:
        process.join()
    leader.close()
    return {name: np.array(spans[steps // 20 :]) / 1e3 for name, spans in times.items()}, smallest


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--sequences", type=int, default=64)
    parser.add_argument("--steps", type=int, default=3000)
    parser.add_argument(
        "--step", type=float, default=0.003, metavar="SECONDS", help="of the GPU (default: %(default)s)"
    )
    parser.add_argument("--output", type=Path, metavar="FILE", help="the record, JSON")
    parser.add_argument("--commit", help="for a tree without its git repository")
    args = parser.parse_args(argv)

    def time_them() -> None:
        if args.output is not None:
            check_writable(args.output)
        times, smallest = measure(args.ranks, args.sequences, args.steps, args.step)
        policy = {os.SCHED_FIFO: "SCHED_FIFO", os.SCHED_RR: "SCHED_RR"}.get(os.sched_getscheduler(0), "normal")
        command = shlex.join(["python", "-m", "benchmarks.serving.step_broadcast", *(argv or sys.argv[1:])])
        results = StepBroadcastResults(
            environment=describe(command, args.commit, cpu=cpu_name(), cores=os.cpu_count()),
            ranks=args.ranks,
            sequences=args.sequences,
            steps=args.steps,
            step_us=1e6 * args.step,
            priority=policy,
            message_bytes=smallest,
            spans={
                name: Span(p50_us=round(np.percentile(us, 50), 1), p99_us=round(np.percentile(us, 99), 1))
                for name, us in times.items()
            },
        )
        if args.output is not None:
            results.save(args.output)
        rows = {_PARTS[name]: f"p50 {s.p50_us:.0f} µs, p99 {s.p99_us:.0f} µs" for name, s in results.spans.items()}
        print_table({"message": f"{smallest} bytes"} | rows)

    return run(time_them)


if __name__ == "__main__":
    sys.exit(main())
