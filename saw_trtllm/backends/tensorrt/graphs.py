"""Steps of decodes as CUDA graphs: one for each of a few batch sizes, larger ones padded up to the next.

A graph is launched at one go, where the host needs a call for each of a step's kernels. It keeps the addresses and
extents that it was recorded with; what differs between two steps of a size, tokens, lengths and block tables, is read
on the GPU.
"""

from __future__ import annotations

import logging
from bisect import bisect_left
from collections.abc import Callable

from saw_trtllm.backends.tensorrt.cuda import Graph, Stream
from saw_trtllm.errors import KernelError

log = logging.getLogger(__name__)

#: Sequences from which on the host keeps up without a graph: a step takes longer than its launches.
LARGEST = 512


def buckets(max_batch_size: int) -> list[int]:
    """Batch sizes that have a graph, ascending.

    A padded row costs a row of the GEMMs, which are bound by their weights here, so the sizes may be an eighth to a
    quarter apart.
    """
    largest = min(max_batch_size, LARGEST)
    sizes = [1, 2, 4, *range(8, 64, 8), *range(64, 128, 16), *range(128, 256, 32), *range(256, LARGEST + 1, 64)]
    return [size for size in sizes if size < largest] + [largest]


class DecodeGraphs:
    """The graphs of an engine.

    Attributes
    ----------
    sizes : list of int
        Batch sizes that are recorded, ascending.
    """

    def __init__(self) -> None:
        self.sizes: list[int] = []
        self._graphs: dict[int, Graph] = {}

    def record(
        self,
        sizes: list[int],
        stream: Stream,
        prepare: Callable[[int], None],
        enqueue: Callable[[int], None],
        agree: Callable[[bool], bool] = bool,
    ) -> None:
        """Record what ``enqueue`` puts on the stream for each batch size, after a first run on ``prepare``'s inputs.

        The small ones, which gain most, come first: where the memory ends, the others are left out. ``agree`` says
        after each size whether all ranks have recorded it: a sum is of as many rows on each, and none may begin a step
        that the others do not.
        """
        for size in sorted(sizes):
            graph = _capture(size, stream, prepare, enqueue)
            if agree(graph is not None) and graph is not None:
                self._graphs[size] = graph
                self.sizes.append(size)
                continue
            if graph is not None:
                graph.close()
            break

    def size_for(self, num_sequences: int) -> int | None:
        """The least size that holds so many sequences, if there is one."""
        at = bisect_left(self.sizes, num_sequences)
        return self.sizes[at] if at < len(self.sizes) else None

    def launch(self, size: int, stream: Stream) -> None:
        """Run a step."""
        self._graphs[size].launch(stream)

    def close(self) -> None:
        """Destroy them."""
        for graph in self._graphs.values():
            graph.close()
        self._graphs.clear()
        self.sizes.clear()


def _capture(size: int, stream: Stream, prepare: Callable[[int], None], enqueue: Callable[[int], None]) -> Graph | None:
    try:
        # What CUDA and TensorRT set up at a first launch cannot be recorded.
        prepare(size)
        enqueue(size)
        stream.synchronize()
        with stream.capture() as graph:
            enqueue(size)
    except KernelError as e:
        log.warning("decodes of %d sequences and more run without a CUDA graph: %s", size, e)
        return None
    return graph
