"""Times on an executor's stream."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

#: Bytes written to keep the GPU busy while the host launches: 1 to 2 ms of it.
_DELAY_BYTES, _DELAY_WRITES = 256 << 20, 16


class StreamClock:
    """Marks in the order of a stream, and the times between them.

    Parameters
    ----------
    stream : int
    """

    def __init__(self, stream: int) -> None:
        from saw_trtllm.backends.tensorrt import cuda

        self._call, self._runtime, self._stream = cuda.call, cuda.runtime, stream
        self._delay = cuda.DeviceBuffer(_DELAY_BYTES)

    def mark(self) -> Any:
        """The point that the stream has come to when all put on it so far is done."""
        event = self._call(self._runtime.cudaEventCreate)
        self._call(self._runtime.cudaEventRecord, event, self._stream)
        return event

    def delay(self) -> None:
        """Keep the stream busy for a while, so that what is put on it next does not wait for the host."""
        for _ in range(_DELAY_WRITES):
            self._call(self._runtime.cudaMemsetAsync, self._delay.address, 0, _DELAY_BYTES, self._stream)

    def intervals(self, marks: list[Any]) -> list[float]:
        """µs from each mark to the next, once all have been reached."""
        self._call(self._runtime.cudaEventSynchronize, marks[-1])
        times = [1e3 * self._call(self._runtime.cudaEventElapsedTime, a, b) for a, b in pairwise(marks)]
        for mark in marks:
            self._call(self._runtime.cudaEventDestroy, mark)
        return times

    def close(self) -> None:
        """Release what it holds."""
        self._delay.close()
