"""From a plan to an engine of the reference: a safetensors file of the weights, and a calibration's constants."""

from __future__ import annotations

from collections.abc import Callable

from saw_trtllm.checkpoint import SafetensorsWriter
from saw_trtllm.engine.config import engine_file
from saw_trtllm.model.quantization import QuantizedWeight
from saw_trtllm.plan.folder import replacing_engine
from saw_trtllm.plan.plan import BuildPlan


def build_engine(plan: BuildPlan, progress: Callable[[str], None] | None = None) -> int:
    """Write the engine folder of a plan.

    Parameters
    ----------
    plan : BuildPlan
    progress : callable, optional
        Called with the name of each tensor that has been written.

    Returns
    -------
    int
        Bytes of the engine file.
    """
    with replacing_engine(plan.output_dir, plan.checkpoint.folder) as part:
        path = part / engine_file()
        weights = plan.weights
        with SafetensorsWriter(path, weights.tensors) as writer:
            for name in weights.shapes:
                weight = weights.load(name)
                arrays = weight.arrays(name) if isinstance(weight, QuantizedWeight) else {name: weight}
                for stored, array in arrays.items():
                    writer.write(stored, array)
                if progress is not None:
                    progress(name)
        plan.config.save(part)
        return path.stat().st_size
