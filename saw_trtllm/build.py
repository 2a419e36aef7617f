"""The door from a checkpoint to an engine folder."""

from __future__ import annotations

from collections.abc import Callable

from saw_trtllm.backends.registry import free_memory
from saw_trtllm.checkpoint import (
    SafetensorsWriter,
)
from saw_trtllm.engine.config import (
    engine_file,
)
from saw_trtllm.errors import ConfigError
from saw_trtllm.plan.folder import check_replaceable, replacing_engine
from saw_trtllm.plan.plan import BuildPlan
from saw_trtllm.plan.tensorrt_options import Phases
from saw_trtllm.runtime.kv_cache_config import KvCacheConfig


def build(plan: BuildPlan, progress: Callable[[str], None] | None = None, phases: Phases | None = None) -> int:
    """Write the engine folder of a plan.

    An engine that is there stays until the new one is whole.

    Parameters
    ----------
    plan : BuildPlan
    progress : callable, optional
        Called with the name of each tensor that has been written, or read for a compiler.
    phases : Phases, optional
        Told of the phases of TensorRT's build.

    Returns
    -------
    int
        Bytes of the engine file.

    Raises
    ------
    ConfigError
        If the folder cannot be written.
    CheckpointError
        If a weight cannot be read, is not finite, or is too large for the engine's dtype.
    EngineError
        If TensorRT does not build the engine.
    """
    folder = plan.output_dir
    try:
        folder.mkdir(parents=True, exist_ok=True)
        check_replaceable(plan)
        if plan.config.saw_int4.backend == "tensorrt_llm":
            from saw_trtllm.backends.tensorrt_llm.build import build_engines

            return build_engines(plan, progress)
        if plan.config.saw_int4.backend == "tensorrt":
            from saw_trtllm.backends.tensorrt.build import build_engine

            return build_engine(plan, progress, phases)
        with replacing_engine(plan) as part:
            path = part / engine_file()
            centers = () if plan.calibration is None else plan.calibration.centers
            with SafetensorsWriter(path, plan.engine_shapes, plan.config.pretrained_config.dtype, centers) as writer:
                for name in plan.engine_shapes:
                    writer.write(name, plan.load(name))
                    if progress is not None:
                        progress(name)
            plan.config.save(part)
            return path.stat().st_size
    except OSError as e:
        raise ConfigError(
            f"{folder} cannot be written ({e.strerror or e}): choose another --output_dir or make room"
        ) from e


def tokens_that_fit(plan: BuildPlan, kv: str | None = None) -> int:
    """Tokens of KV cache that the free memory holds beside the weights, as the runtime will have it, about."""
    backend = plan.config.saw_int4.backend
    # The reference keeps its weights in fp32.
    weights = plan.checkpoint.nbytes("float32" if backend == "reference" else plan.config.pretrained_config.dtype)
    free = max(0, free_memory(backend) - weights)
    return int(KvCacheConfig.free_gpu_memory_fraction * free) // plan.bytes_per_token(kv)
