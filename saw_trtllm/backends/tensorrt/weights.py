"""The weights that are inputs of an engine, in the GPU's memory."""

from __future__ import annotations

from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, closing
from pathlib import Path
from queue import SimpleQueue

import numpy as np

from saw_trtllm.backends.tensorrt.constants import LoadArray
from saw_trtllm.backends.tensorrt.cuda import ALIGNMENT, DeviceBuffer, PinnedBuffer, Stream, call, runtime
from saw_trtllm.checkpoint.reader import open_file
from saw_trtllm.engine.config import CONFIG_FILE
from saw_trtllm.errors import CheckpointError, EngineError
from saw_trtllm.model.quantization import TensorSpec

#: Bytes that are copied at a time, and threads that do so: one reads memory at a fraction of the GPU's bus.
_PIECE, _THREADS = 16 << 20, 4


class DeviceWeights:
    """Weights in one piece of the GPU's memory.

    Parameters
    ----------
    specs : dict of (str, TensorSpec)
    load : callable
        Gives the array of a name; each is asked for once, by several threads.

    Attributes
    ----------
    addresses : dict of (str, int)
    """

    def __init__(self, specs: Mapping[str, TensorSpec], load: LoadArray) -> None:
        places, end = dict[str, int](), 0
        for name, spec in specs.items():
            places[name], end = end, end + -(-spec.nbytes // ALIGNMENT) * ALIGNMENT
        self._memory = DeviceBuffer(end)
        self.addresses = {name: self._memory.address + place for name, place in places.items()}
        try:
            self._fill(load)
        except BaseException:
            self.close()
            raise

    def _fill(self, load: LoadArray) -> None:
        device, lanes = call(runtime.cudaGetDevice), SimpleQueue[_Lane]()
        with ExitStack() as stack, ThreadPoolExecutor(_THREADS) as pool:
            for _ in range(min(_THREADS, len(self.addresses))):
                lanes.put(stack.enter_context(closing(_Lane())))

            def copy(name: str) -> None:
                call(runtime.cudaSetDevice, device)
                array, lane = load(name), lanes.get()
                try:
                    lane.copy(array, self.addresses[name])
                finally:
                    lanes.put(lane)

            for _ in pool.map(copy, self.addresses):
                pass

    def close(self) -> None:
        """Free them."""
        self._memory.close()


class _Lane:
    """A way to the GPU for one thread at a time, by pinned memory of its own."""

    def __init__(self) -> None:
        self._stream, self._buffer = Stream(), PinnedBuffer(_PIECE)
        self._pinned = self._buffer.array(np.uint8, (_PIECE,))

    def copy(self, array: np.ndarray, address: int) -> None:
        """Copy an array there, and wait."""
        data = np.ascontiguousarray(array).reshape(-1).view(np.uint8)
        for start in range(0, len(data), _PIECE):
            piece = data[start : start + _PIECE]
            np.copyto(self._pinned[: len(piece)], piece)
            self._stream.upload(address + start, self._buffer.address, len(piece))
            self._stream.synchronize()

    def close(self) -> None:
        """Free it."""
        self._stream.close()
        self._buffer.close()


def stored_weights(path: Path, specs: Mapping[str, TensorSpec]) -> LoadArray:
    """Give the arrays of a file that a build wrote, over its mapping.

    Raises
    ------
    EngineError
        If there is no such file, it is not whole, or it holds others.
    """
    if not specs:
        return dict[str, np.ndarray]().__getitem__
    try:
        stored = open_file(path)
    except CheckpointError as e:
        raise EngineError(
            f"{path} is not there, or not whole: copy the engine again, or build it anew with saw-build"
        ) from e
    if {name: TensorSpec(x.shape, x.dtype) for name, x in stored.items()} != _as_stored(specs):
        raise EngineError(
            f"{path} does not hold the weights that {CONFIG_FILE} beside it says: build the engine anew with saw-build"
        )
    return lambda name: stored[name].load()


def _as_stored(specs: Mapping[str, TensorSpec]) -> dict[str, TensorSpec]:
    """With the dtypes as a file spells them where no config can."""
    return {name: spec._replace(dtype="I32") if spec.dtype == "int32" else spec for name, spec in specs.items()}
