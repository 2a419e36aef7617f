"""A step's tensors on their way to the GPU: packed into pinned memory, and copied at one go."""

from __future__ import annotations

import math
from collections.abc import Mapping
from functools import lru_cache
from typing import NamedTuple

import numpy as np

from saw_trtllm.backends.tensorrt.cuda import ALIGNMENT, DeviceBuffer, Event, PinnedBuffer, Stream, align
from saw_trtllm.engine.step import StepInputs
from saw_trtllm.engine.tensors import (
    BLOCK_OFFSETS,
    INPUT_IDS,
    LAST_TOKEN_IDS,
    POSITION_IDS,
    REQUEST_TYPES,
    SEQUENCE_LENGTH,
)

#: Of a step, what lies on the GPU: int32 all of it. The block table comes last, since only it may be padded within.
TABLE = BLOCK_OFFSETS.name
_PER_TOKEN = (INPUT_IDS.name, POSITION_IDS.name)
_PER_SEQUENCE = (LAST_TOKEN_IDS.name, SEQUENCE_LENGTH.name)

_WORD = np.dtype(np.int32).itemsize


class StepShape(NamedTuple):
    """Extents of a step's tensors.

    Attributes
    ----------
    num_tokens, num_sequences, num_pools, max_blocks : int
    """

    num_tokens: int
    num_sequences: int
    num_pools: int
    max_blocks: int

    @classmethod
    def of(cls, step: StepInputs) -> StepShape:
        """A step's own."""
        pools, sequences, _, blocks = step.kv_cache_block_offsets.shape
        return cls(len(step.input_ids), sequences, pools, blocks)

    @property
    def tensors(self) -> dict[str, tuple[int, ...]]:
        """Shapes by name, in the order in which they lie."""
        return _layout(self)[0]

    @property
    def offsets(self) -> dict[str, int]:
        """Byte at which each tensor begins."""
        return _layout(self)[1]

    @property
    def nbytes(self) -> int:
        """Bytes of all."""
        return _layout(self)[2]


@lru_cache(maxsize=1024)  # a decode's extents come again and again
def _layout(shape: StepShape) -> tuple[dict[str, tuple[int, ...]], dict[str, int], int]:
    tensors: dict[str, tuple[int, ...]] = dict.fromkeys(_PER_TOKEN, (shape.num_tokens,))
    tensors |= dict.fromkeys(_PER_SEQUENCE, (shape.num_sequences,))
    tensors[TABLE] = (shape.num_pools, shape.num_sequences, 2, shape.max_blocks)
    offsets, end = {}, 0
    for name, extents in tensors.items():
        offsets[name] = end
        end = align(end + math.prod(extents) * _WORD)
    return tensors, offsets, end


class Staging:
    """The inputs' place on the GPU, and two in pinned memory, which are filled in turn.

    Two steps are in flight at most, so the older of the two is free again without a wait.

    Parameters
    ----------
    largest : StepShape
        That of any step.

    Attributes
    ----------
    nbytes : int
        Of the GPU's memory.
    """

    def __init__(self, largest: StepShape) -> None:
        self.nbytes = largest.nbytes
        self._device = DeviceBuffer(self.nbytes)
        # Grown when a step needs more: the largest step's table may be many times that of any step that comes.
        self._pinned = [PinnedBuffer(ALIGNMENT) for _ in range(2)]
        self._copied = [Event() for _ in range(2)]

    def addresses(self, shape: StepShape) -> dict[str, int]:
        """Where the tensors of a step of this shape lie on the GPU."""
        return {name: self._device.address + at for name, at in shape.offsets.items()}

    def upload(self, step: StepInputs, stream: Stream, padded: StepShape | None = None) -> StepShape:
        """Copy a step's tensors to the GPU.

        Parameters
        ----------
        step : StepInputs
        stream : Stream
            On which the copies take their turn.
        padded : StepShape, optional
            A larger shape to put a step of decodes into. Rows after its own are sequences of length 0, of which the
            plugins write and read nothing.

        Returns
        -------
        StepShape
            That of what lies on the GPU.
        """
        own = StepShape.of(step)
        shape = padded or own
        offsets = shape.offsets
        table_bytes = step.kv_cache_block_offsets.nbytes
        pinned = self._next(offsets[TABLE] + table_bytes)
        fills = dict.fromkeys(_PER_TOKEN, 0) | {LAST_TOKEN_IDS.name: own.num_tokens, SEQUENCE_LENGTH.name: 0}
        for name, fill in fills.items():
            source, target = getattr(step, name), pinned.array(np.int32, shape.tensors[name], offsets[name])
            target[: len(source)] = source
            target[len(source) :] = fill
        pinned.array(np.int32, step.kv_cache_block_offsets.shape, offsets[TABLE])[...] = step.kv_cache_block_offsets
        base, table = self._device.address, offsets[TABLE]
        if shape == own:
            stream.upload(base, pinned.address, table + table_bytes)
        else:
            stream.upload(base, pinned.address, table)
            # Rows of the table lie close together in pinned memory and as far apart as the longest on the GPU.
            pitch, width, rows = shape.max_blocks * _WORD, own.max_blocks * _WORD, 2 * own.num_sequences
            for pool in range(own.num_pools):
                to = base + table + pool * 2 * shape.num_sequences * pitch
                stream.upload_rows(to, pitch, pinned.address + table + pool * rows * width, width, rows)
        self._copied[0].record(stream)
        return shape

    def close(self) -> None:
        """Free all of it."""
        self._device.close()
        for pinned in self._pinned:
            pinned.close()
        for event in self._copied:
            event.close()

    def _next(self, nbytes: int) -> PinnedBuffer:
        self._pinned.reverse()
        self._copied.reverse()
        self._copied[0].synchronize()
        if self._pinned[0].nbytes < nbytes:
            self._pinned[0] = self._pinned[0].grown(2 * nbytes)
        return self._pinned[0]


class HostTensors:
    """The engine's inputs that stay on the host, where the plugins read them as they are enqueued.

    Parameters
    ----------
    arrays : dict
        Those that are the same in every step.
    max_sequences : int
    """

    def __init__(self, arrays: Mapping[str, np.ndarray], max_sequences: int) -> None:
        self._arrays = {name: np.ascontiguousarray(array) for name, array in arrays.items()}
        self._types = np.ones(max_sequences, np.int32)

    def tensors(self, step: StepInputs | None, num_sequences: int) -> dict[str, tuple[int, tuple[int, ...]]]:
        """Address and shape of each; the sequences after a step's own are decodes."""
        self._types[:num_sequences] = 1
        if step is not None:
            self._types[: len(step.host_request_types)] = step.host_request_types
        found = {name: (array.ctypes.data, array.shape) for name, array in self._arrays.items()}
        return found | {REQUEST_TYPES.name: (self._types.ctypes.data, (num_sequences,))}
