"""A sum between GPUs in a CUDA graph, by our kernel and by NCCL."""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from contextlib import closing
from statistics import median

import numpy as np

from benchmarks.engine.processes import SECONDS, start_ranks
from saw_trtllm.errors import KernelError
from saw_trtllm.runtime.collectives import Collectives

#: Sums in a graph, and launches of it that are timed after others.
CHAIN, WARM_UP, LAUNCHES = 64, 3, 9
ROWS = (1, 2, 4, 8, 16, 32, 64, 96, 128, 256, 512, 2048)
#: Of NCCL's ncclFloat16 and ncclSum.
_FLOAT16, _SUM = 6, 0


class _Sums:
    """A rank's side: each sum takes the last one's result, as those of an engine do."""

    def __init__(self, collectives: Collectives, most: int) -> None:
        from saw_trtllm.backends.tensorrt.cuda import DeviceBuffer, Stream, call, runtime
        from saw_trtllm.backends.tensorrt.ranks import RankGroup, use_gpu_of_rank
        from saw_trtllm.ops.arrays import kernels
        from saw_trtllm.plugins.library import load_nccl

        use_gpu_of_rank(collectives)
        self._collectives, self._device = collectives, call(runtime.cudaGetDevice)
        self._group, self._stream = RankGroup(collectives), Stream()
        self._module, self._nccl = kernels(), load_nccl()
        self.nccl_version = self._group.nccl_version
        self._buffers = [DeviceBuffer(2 * most) for _ in range(2)]
        for buffer in self._buffers:
            buffer.fill(0)

    def by_kernel(self, count: int) -> float | None:
        """µs of a sum of so many numbers; None if the kernel does not take them."""
        if not self._group.one_shot:
            return None
        arguments = {"ranks": self._group.ranks, "count": count, "dtype": self._module.DType.float16}
        arguments |= {"device": self._device, "stream": self._stream.handle}
        there = [buffer.address for buffer in self._buffers]
        if self._module.all_reduce(x=there[0], y=there[1], **arguments):
            return None
        return self._time(lambda x, y: self._module.all_reduce(x=x, y=y, **arguments))

    def by_nccl(self, count: int) -> float:
        """The same of NCCL, which takes any."""
        communicator, stream = ctypes.c_void_p(self._group.communicator), ctypes.c_void_p(self._stream.handle)

        def enqueue(x: int, y: int) -> int:
            ends = ctypes.c_void_p(x), ctypes.c_void_p(y)
            return self._nccl.ncclAllReduce(*ends, ctypes.c_size_t(count), _FLOAT16, _SUM, communicator, stream)

        return self._time(enqueue)

    def close(self) -> None:
        """Leave the group."""
        self._group.close()

    def _time(self, enqueue: Callable[[int, int], int]) -> float:
        from benchmarks.engine.clock import StreamClock

        there = [buffer.address for buffer in self._buffers]
        if enqueue(*there):  # outside of a graph first: NCCL connects the ranks then
            raise KernelError("a sum was not computed")
        self._stream.synchronize()
        with self._stream.capture() as graph:
            for _ in range(CHAIN):
                if enqueue(*there):
                    raise KernelError("a sum was not recorded")
                there.reverse()
        times = []
        with closing(StreamClock(self._stream.handle)) as clock:
            for _ in range(WARM_UP + LAUNCHES):
                self._collectives.all_gather(np.zeros(1))
                graph.launch(self._stream)  # in which the ranks come together
                marks = [clock.mark()]
                graph.launch(self._stream)
                marks.append(clock.mark())
                times += clock.intervals(marks)
        graph.close()
        return median(times[WARM_UP:]) / CHAIN


def time_sums(collectives: Collectives, width: int) -> tuple[str, list[tuple[int, float | None, float]]]:
    """NCCL's version, and of each number of rows µs of our kernel and of NCCL; all ranks call it."""
    with closing(_Sums(collectives, max(ROWS) * width)) as sums:
        return sums.nccl_version, [(rows, sums.by_kernel(rows * width), sums.by_nccl(rows * width)) for rows in ROWS]


def measure_sums(tp_size: int, width: int) -> tuple[str, list[tuple[int, float | None, float]]]:
    """What :func:`time_sums` finds, with this process as the first rank."""
    collectives, processes = start_ranks(tp_size, time_sums, [(width,)] * (tp_size - 1))
    with closing(collectives):
        found = time_sums(collectives, width)
    for process in processes:
        process.join(SECONDS)
        process.kill()
    return found
