"""``python -m benchmarks.engine.sums --tp_size N``: a sum between GPUs in a CUDA graph, by our kernel and by NCCL."""

from __future__ import annotations

import argparse
import ctypes
import sys
from collections.abc import Callable, Sequence
from contextlib import closing
from statistics import median

import numpy as np

from benchmarks.engine.processes import start_ranks
from saw_trtllm.cli.common import print_table, run
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
        self._buffers = [DeviceBuffer(2 * most) for _ in range(2)]
        for buffer in self._buffers:
            buffer.fill(0)

    def by_kernel(self, count: int) -> float | None:
        """µs of a sum of so many numbers; None if the kernel does not take them."""
        if not self._group.one_shot:
            return None
        arguments = {"ranks": self._group.ranks, "count": count, "dtype": self._module.DType.float16}
        arguments |= {"device": self._device, "stream": self._stream.handle}
        return self._time(lambda x, y: self._module.all_reduce(x=x, y=y, **arguments))

    def by_nccl(self, count: int) -> float | None:
        """The same of NCCL, which takes any."""
        communicator, stream = ctypes.c_void_p(self._group.communicator), ctypes.c_void_p(self._stream.handle)

        def enqueue(x: int, y: int) -> int:
            ends = ctypes.c_void_p(x), ctypes.c_void_p(y)
            return self._nccl.ncclAllReduce(*ends, ctypes.c_size_t(count), _FLOAT16, _SUM, communicator, stream)

        return self._time(enqueue)

    def _time(self, enqueue: Callable[[int, int], int]) -> float | None:
        from benchmarks.engine.clock import StreamClock

        there = [buffer.address for buffer in self._buffers]
        if enqueue(*there):
            return None
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


def time_sums(collectives: Collectives, width: int) -> dict[str, str]:
    """Of each number of rows both times, in words; all ranks call it."""
    sums, found = _Sums(collectives, max(ROWS) * width), {f"rows of {width}": "our kernel, NCCL"}
    for rows in ROWS:
        times = sums.by_kernel(rows * width), sums.by_nccl(rows * width)
        found[str(rows)] = ", ".join("not taken" if us is None else f"{us:.2f} µs" for us in times)
    return found


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.engine.sums", description=__doc__)
    parser.add_argument("--tp_size", type=int, default=2, metavar="N", help="GPUs (default: %(default)s)")
    parser.add_argument("--width", type=int, default=4096, metavar="N", help="numbers of a row (default: %(default)s)")
    args = parser.parse_args(argv)

    def time_them() -> None:
        collectives, _ = start_ranks(args.tp_size, time_sums, [(args.width,)] * (args.tp_size - 1))
        print_table(time_sums(collectives, args.width))

    return run(time_them)


if __name__ == "__main__":
    sys.exit(main())
