"""Giving an engine that was built without weights those of its checkpoint."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from saw_trtllm.backends.tensorrt.constants import Constants, PackedWeights, weight_inputs
from saw_trtllm.backends.tensorrt.versions import TensorRT
from saw_trtllm.backends.tensorrt.weights import DeviceWeights
from saw_trtllm.engine.config import CONFIG_FILE
from saw_trtllm.errors import EngineError
from saw_trtllm.plan.weights import EngineWeights
from saw_trtllm.progress import progress


def refit(path: Path, weights: EngineWeights, tensorrt: TensorRT, engine: Any, logger: Any) -> DeviceWeights:
    """Put weights into an engine, folded as a build folds them.

    Parameters
    ----------
    path : Path
        Of the engine, for messages.
    weights : EngineWeights
    tensorrt : TensorRT
    engine : tensorrt.ICudaEngine
    logger : tensorrt.ILogger
        The engine's.

    Returns
    -------
    DeviceWeights
        Those that are the engine's inputs.

    Raises
    ------
    CheckpointError
        If a tensor cannot be read, is not finite, or is too large for the engine's dtype.
    EngineError
        If the engine does not take them.
    """
    refitter = tensorrt.trt.Refitter(engine, logger)
    names = refitter.get_all_weights()
    arrays: list[np.ndarray] = []  # TensorRT reads them when it refits
    with (
        progress(len(weights.shapes), "weights", "tensors") as bar,
        weights.reading_ahead(progress=lambda _: bar.update()) as load,
    ):
        packed = PackedWeights(load)
        constants = Constants(weights.config.of_rank(), packed)
        for name in names:
            try:
                arrays.append(np.ascontiguousarray(constants[name]))
            except KeyError:
                raise EngineError(
                    f"{path} is not of its {CONFIG_FILE}, whose model has no {name}: build it anew with saw-build"
                ) from None
            if not refitter.set_named_weights(name, tensorrt.weights(arrays[-1])):
                raise EngineError(
                    f"{path} does not take the weights {name} ({logger.reason}): build it anew with saw-build"
                )
        if not refitter.refit_cuda_engine():
            raise EngineError(f"{path} does not take its weights ({logger.reason}): build it anew with saw-build")
        return DeviceWeights(weight_inputs(weights.config), packed)
