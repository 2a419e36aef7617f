"""From a plan to an engine of the reference: a safetensors file a rank of the weights and a calibration's constants."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack

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
        Called with the name of each tensor that has been written, once a rank.

    Returns
    -------
    int
        Bytes of the engine files.
    """
    weights = plan.weights
    ranks = [weights.of_rank(rank) for rank in range(plan.config.tp_size)]
    with replacing_engine(plan.output_dir, plan.checkpoint.folder) as part, ExitStack() as stack:
        paths = [part / engine_file(rank) for rank in range(len(ranks))]
        writers = [
            stack.enter_context(SafetensorsWriter(path, rank.tensors)) for path, rank in zip(paths, ranks, strict=True)
        ]
        for name in weights.shapes:  # side by side, so that each tensor is read once
            whole = weights.load(name)
            for rank, writer in zip(ranks, writers, strict=True):
                weight = rank.part(name, whole)
                arrays = weight.arrays(name) if isinstance(weight, QuantizedWeight) else {name: weight}
                for stored, array in arrays.items():
                    writer.write(stored, array)
                if progress is not None:
                    progress(name)
        stack.close()
        plan.config.save(part)
        return sum(path.stat().st_size for path in paths)
