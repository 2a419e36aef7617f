"""How long a step takes from the leader to all ranks of this machine.

``python -m benchmarks.serving.step_broadcast --help``

Sequences of 6400 tokens and more decode, with a pause between two steps as a GPU makes one. Of each step: the
leader packs it, sends it, and each rank unpacks it; all clocks are the machine's.
"""

from __future__ import annotations

import argparse
import multiprocessing
import pickle
import time

import numpy as np

from saw_trtllm.engine.step import DECODE, StepPacker, StepSequence
from saw_trtllm.parallel.channel import Address, LeaderChannel, RankChannel
from saw_trtllm.parallel.codec import StepDecoder, StepEncoder
from saw_trtllm.runtime.sampling import SamplingState
from saw_trtllm.runtime.sampling_params import SamplingParams

_LAYERS, _START, _BLOCK = 32, 6400, 32


def _rank(address: Address, rank: int) -> None:
    channel, decoder = RankChannel(address, rank), StepDecoder([_LAYERS])
    while True:
        _, command, frames = channel.receive()
        arrived = time.monotonic_ns()
        if command == "close":
            return
        decoder.decode(*frames)
        channel.say((arrived, time.monotonic_ns()))


def measure(ranks: int, sequences: int, steps: int, pause: float) -> dict[str, np.ndarray]:
    """Microseconds of each part of each step, the last rank's of those of the ranks."""
    leader, context = LeaderChannel(ranks), multiprocessing.get_context("spawn")
    processes = [context.Process(target=_rank, args=(leader.address, rank)) for rank in range(ranks)]
    for process in processes:
        process.start()
    while not leader.accept(1.0):
        pass
    leader.begin(60.0)
    packer, encoder, params = StepPacker([_LAYERS]), StepEncoder(_LAYERS), SamplingParams(seed=1, temperature=1.0)
    tables = [list(range(i * 1000, i * 1000 + _START // _BLOCK + 1)) for i in range(sequences)]
    texts: list[list[int]] = [[] for _ in tables]
    times: dict[str, list[int]] = {name: [] for name in ("pack", "send", "unpack", "all")}
    for number in range(steps):
        for i, table in enumerate(tables):
            if (number + i) % _BLOCK == 0:
                table.append(table[-1] + 1)
        parts = [StepSequence([-1 - i], _START + number, 100, DECODE, table) for i, table in enumerate(tables)]
        states = [SamplingState(params, [], text, (), number) for text in texts]
        step = packer.pack(parts)
        time.sleep(pause)
        begun = time.monotonic_ns()
        frames = encoder.encode(step, states, [False] * sequences)
        packed = time.monotonic_ns()
        leader.send("launch", *frames)
        answers: list[tuple[int, int]] = []
        while len(answers) < ranks:
            answers += [content for _, _, content in leader.receive(5.0)]
        arrived, unpacked = (max(answer[i] for answer in answers) for i in (0, 1))
        spans = (packed - begun, arrived - packed, max(b - a for a, b in answers), unpacked - begun)
        for name, span in zip(times, spans, strict=True):
            times[name].append(span)
    leader.send("close", pickle.dumps(None))
    for process in processes:
        process.join()
    leader.close()
    return {name: np.array(spans[steps // 20 :]) / 1e3 for name, spans in times.items()}


def main() -> None:
    """Print percentiles."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--sequences", type=int, default=64)
    parser.add_argument("--steps", type=int, default=3000)
    parser.add_argument("--pause", type=float, default=0.003, metavar="SECONDS")
    args = parser.parse_args()
    for name, spans in measure(args.ranks, args.sequences, args.steps, args.pause).items():
        p50, p99 = np.percentile(spans, [50, 99])
        print(f"{name:7} p50 {p50:7.1f} us  p99 {p99:7.1f} us")


if __name__ == "__main__":
    main()
