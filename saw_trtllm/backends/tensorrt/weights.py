"""The weights that are inputs of an engine, in the GPU's memory."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import numpy as np

from saw_trtllm.backends.tensorrt.constants import LoadArray
from saw_trtllm.backends.tensorrt.cuda import ALIGNMENT, DeviceBuffer
from saw_trtllm.checkpoint.reader import open_file
from saw_trtllm.engine.config import CONFIG_FILE
from saw_trtllm.errors import CheckpointError, EngineError
from saw_trtllm.model.quantization import TensorSpec


class DeviceWeights:
    """Weights in one piece of the GPU's memory.

    Parameters
    ----------
    specs : dict of (str, TensorSpec)
    load : callable
        Gives the array of a name; each is asked for once.

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
            for name, place in places.items():
                self._memory.write(load(name), place)
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        """Free them."""
        self._memory.close()


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
