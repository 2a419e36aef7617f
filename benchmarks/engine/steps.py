"""Decode steps given to an executor directly, on a cache that nobody filled: only lengths are needed."""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Callable, Sequence
from statistics import median, quantiles
from typing import Any, Protocol

import numpy as np

from benchmarks.engine.cases import Part, classify
from benchmarks.engine.record import Profile, Step
from saw_trtllm.engine.config import EngineConfig
from saw_trtllm.engine.step import DECODE, StepInputs, StepPacker, StepSequence
from saw_trtllm.runtime.sampling import SamplingState
from saw_trtllm.runtime.sampling_params import SamplingParams

#: Steps of a case on an executor: as many as fit a time, between so few and so many, in so many rounds.
BUDGET_S, MIN_STEPS, MAX_STEPS, ROUNDS = 0.2, 24, 96, 6
#: Before them: clocks rise.
WARM_UP = 3
#: Steps timed one by one, and profiles of each layer.
SINGLES, PROFILES = 7, 5


class Clock(Protocol):
    """Marks on the executor's stream: :class:`~benchmarks.engine.clock.StreamClock`, or a test's."""

    def mark(self) -> Any:
        """The point that the stream has come to."""

    def delay(self) -> None:
        """Keep the stream busy, so that what comes next does not wait for the host."""

    def intervals(self, marks: list[Any]) -> list[float]:
        """µs from each mark to the next."""


def measure(benches: Sequence[StepBench], batch: int, context: int) -> list[Step]:
    """Time the steps of a batch, executors in turn, each the first in its turn: clocks and heat treat all alike."""
    launches = [bench.launcher(batch, context) for bench in benches]
    counts = [bench.steps_a_round(launch) for bench, launch in zip(benches, launches, strict=True)]
    times: list[list[float]] = [[] for _ in benches]
    for turn in range(ROUNDS * len(benches)):
        first, i = divmod(turn, len(benches))
        i = (first + i) % len(benches)
        times[i] += benches[i].overlapped(launches[i], counts[i])
    steps = []
    for bench, launch, found in zip(benches, launches, times, strict=True):
        tenths = quantiles(found, n=10, method="inclusive")
        steps.append(
            Step(
                batch=batch,
                context=context,
                repetitions=len(found),
                p10_us=round(tenths[0], 2),
                median_us=round(tenths[4], 2),
                p90_us=round(tenths[8], 2),
                gpu_us=round(bench.gpu_us(launch), 2),
                alone_us=round(bench.alone(launch, SINGLES) * 1e6, 2),
            )
        )
    return steps


class StepBench:
    """Times an executor's decode steps.

    Parameters
    ----------
    executor : Executor
        TensorRT's, which also has ``profile``.
    config : EngineConfig
    clock : Clock
    """

    def __init__(self, executor: Any, config: EngineConfig, clock: Clock) -> None:
        self._executor, self._config, self._clock = executor, config, clock
        self._block = config.build_config.tokens_per_block
        self._gemm_plugin = config.build_config.plugin_config.gemm_plugin is not None
        self._layout = config.pool_layout
        self._order = np.random.default_rng(1).permutation(executor.num_blocks // self._layout.num_tables)

    def fits(self, batch: int, context: int) -> bool:
        """Whether the cache holds so many sequences of so many tokens."""
        return batch * -(-context // self._block) <= len(self._order)

    def gpu_us(self, launch: Callable[[], Any]) -> float:
        """Median of the GPU's time for a step that is launched while the GPU is busy with something else."""
        times = []
        for _ in range(SINGLES):
            self._clock.delay()
            marks = [self._clock.mark()]
            pending = launch()
            marks.append(self._clock.mark())
            pending.result()
            times += self._clock.intervals(marks)
        return median(times)

    def gpu_time_of(self, batch: int, context: int) -> float:
        """µs of the GPU for a decode of a batch."""
        launch = self.launcher(batch, context)
        self.alone(launch, WARM_UP)
        return self.gpu_us(launch)

    def profile(self, batch: int, context: int) -> Profile:
        """Time each layer of a step: medians over a few."""
        step = self.inputs(batch, context)
        self._executor.profile(step)
        runs = [self._executor.profile(step) for _ in range(PROFILES)]
        # Names need not be unique: layers are told apart by their place.
        names = [name.partition(" [profile")[0] for name, _ in runs[0]]
        times = [1e3 * median(ms for _, ms in layers) for layers in zip(*runs, strict=True)]
        parts: dict[Part, float] = defaultdict(float)
        for name, us in zip(names, times, strict=True):
            parts[classify(name, self._gemm_plugin)] += us
        return Profile(batch=batch, context=context, parts={part: round(us, 2) for part, us in parts.items()})

    def inputs(self, batch: int, context: int) -> StepInputs:
        """A decode of each sequence's last token, its blocks anywhere in the pool."""
        each = -(-context // self._block)
        tables = self._order[: batch * each].reshape(batch, each)
        sequences = [
            StepSequence([5 + i], context - 1, context - 1, DECODE, self._layout.entries(table))
            for i, table in enumerate(tables)
        ]
        return StepPacker(self._layout).pack(sequences)

    def launcher(self, batch: int, context: int) -> Callable[[], Any]:
        """What begins a decode of a batch."""
        step = self.inputs(batch, context)
        sampling = [SamplingState(SamplingParams(), [5], [5]) for _ in range(batch)]
        return lambda: self._executor.launch(step, sampling, [False] * batch)

    def steps_a_round(self, launch: Callable[[], Any]) -> int:
        """Warm up, and see how many steps are worth timing."""
        return -(-min(MAX_STEPS, max(MIN_STEPS, int(BUDGET_S / self.alone(launch, WARM_UP)))) // ROUNDS)

    def overlapped(self, launch: Callable[[], Any], steps: int) -> list[float]:
        """µs from step to step, each launched before the result of the last is taken."""
        pending = launch()
        marks = [self._clock.mark()]
        for _ in range(steps):
            following = launch()
            marks.append(self._clock.mark())
            pending.result()
            pending = following
        pending.result()
        return self._clock.intervals(marks)

    @staticmethod
    def alone(launch: Callable[[], Any], steps: int) -> float:
        """Median of the seconds from a launch to its result."""
        times = []
        for _ in range(steps):
            start = time.perf_counter()
            launch().result()
            times.append(time.perf_counter() - start)
        return median(times)
