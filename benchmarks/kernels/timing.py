"""Times on the GPU: a cold, clean L2, a CUDA graph, contenders in turn, so that clocks and heat treat all alike."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from statistics import median
from typing import Any

import torch

from benchmarks.kernels.record import Bandwidth

#: Written, and then read elsewhere, before each run: several times the L2 of any GPU. Without the reading, the lines
#: that were written last are written back while the run reads: 7.5 µs of a decode of 64 x 8192 on an H200.
FLUSH_BYTES = 256 << 20
FLUSH = "256 MiB written, then 256 MiB read elsewhere"
BANDWIDTH_BYTES = 4 << 30
#: Time of one contender's repetitions, which are between so few and so many.
BUDGET_US = 150e3
MIN_REPETITIONS, MAX_REPETITIONS = 20, 200


@dataclass
class Prepared:
    """A launch that is ready to be timed."""

    replay: Callable[[], Any]
    captured: bool
    launch: Callable[[], Any]
    """What was captured: it keeps the tensors alive of which a graph knows only the addresses."""


class CudaTimer:
    """Times launches on the current GPU with events, the L2 cold.

    Parameters
    ----------
    repetitions : int, optional
        The most of a case; by default as many as fit a time budget.
    """

    def __init__(self, repetitions: int = MAX_REPETITIONS) -> None:
        self._written = torch.empty(FLUSH_BYTES, dtype=torch.uint8, device="cuda")
        self._read = torch.zeros(FLUSH_BYTES // 4, dtype=torch.float32, device="cuda")
        self._max_repetitions = repetitions

    def prepare(self, launch: Callable[[], Any]) -> Prepared:
        """Run once, for whatever is compiled or set up at a first run, then capture in a CUDA graph if it can be."""
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            launch()
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        try:
            with torch.cuda.graph(graph):
                launch()
        except RuntimeError:
            torch.cuda.synchronize()
            return Prepared(launch, captured=False, launch=launch)
        graph.replay()
        torch.cuda.synchronize()
        return Prepared(graph.replay, captured=True, launch=launch)

    def estimate(self, prepared: Prepared) -> float:
        """Median of a few runs in µs."""
        return median(self._times([prepared], 8)[0])

    def measure(self, prepared: Sequence[Prepared]) -> list[list[float]]:
        """Times in µs of each launch, one run of each in turn."""
        if not prepared:
            return []
        slowest = max(self.estimate(p) for p in prepared)
        repetitions = max(MIN_REPETITIONS, int(BUDGET_US / slowest))
        return self._times(prepared, min(repetitions, self._max_repetitions))

    def _times(self, prepared: Sequence[Prepared], repetitions: int) -> list[list[float]]:
        pairs = []
        for _ in range(repetitions):
            for p in prepared:
                begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
                # The flush takes the GPU longer than the next calls take the CPU: the launch never waits.
                # Without the wait after them, runs queue up, and on an H200 each would seem 1 µs longer.
                self._written.zero_()
                self._read.sum()
                begin.record()
                p.replay()
                end.record()
                torch.cuda.synchronize()
                pairs.append((begin, end))
        times = [begin.elapsed_time(end) * 1e3 for begin, end in pairs]
        return [times[i :: len(prepared)] for i in range(len(prepared))]


def measure_bandwidth(timer: CudaTimer) -> Bandwidth:
    """What the memory gives to PyTorch: a sum over 4 GiB, and the faster of two copies of them."""
    source = torch.zeros(BANDWIDTH_BYTES // 4, dtype=torch.float32, device="cuda")
    target = torch.empty_like(source)
    # On an H200 a kernel copies at 4.26 TB/s, and what PyTorch's copy_ asks of the driver at 2.77 TB/s.
    launches = [source.sum, lambda: target.copy_(source), lambda: torch.add(source, 1.0, out=target)]
    read, *copies = (median(times) for times in timer.measure([timer.prepare(launch) for launch in launches]))
    return Bandwidth(
        read_gbps=round(BANDWIDTH_BYTES / read / 1e3, 1), copy_gbps=round(2 * BANDWIDTH_BYTES / min(copies) / 1e3, 1)
    )
