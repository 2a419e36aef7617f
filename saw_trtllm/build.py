"""The door from a checkpoint to an engine folder."""

from __future__ import annotations

from collections.abc import Callable

from saw_trtllm.backends.registry import BACKENDS, choose_backend
from saw_trtllm.errors import ConfigError
from saw_trtllm.plan.folder import check_replaceable
from saw_trtllm.plan.options import BuildOptions
from saw_trtllm.plan.plan import BuildPlan, make_plan
from saw_trtllm.plan.tensorrt_options import Phases
from saw_trtllm.runtime.kv_cache_config import KvCacheConfig


def plan_build(options: BuildOptions) -> BuildPlan:
    """Choose a backend and check the flags against the checkpoint, without reading weights or writing.

    Raises
    ------
    SawError
        In one sentence, the first thing that does not fit.
    """
    return make_plan(options, *choose_backend(options.backend))


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
        Bytes of the engine files.

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
        check_replaceable(folder, plan.checkpoint.folder)
        return BACKENDS[plan.config.saw_int4.backend].build(plan, progress, phases)
    except OSError as e:
        raise ConfigError(
            f"{folder} cannot be written ({e.strerror or e}): choose another --output_dir or make room"
        ) from e


def tokens_that_fit(plan: BuildPlan, kv: str | None = None, context: int | None = None) -> int:
    """Tokens of KV cache that the free memory holds beside the weights, as the runtime will have it, about.

    Parameters
    ----------
    plan : BuildPlan
    kv : str, optional
        Another cache than the plan's.
    context : int, optional
        Tokens of each sequence, by default the engine's most: windows bound what the longer ones hold.
    """
    context = plan.config.build_config.max_seq_len if context is None else context
    weights = sum(plan.weights.of_rank(0).bytes_by_kind(plan.backend.weight_dtype()).values())
    free = max(0, plan.backend.free_memory(plan.config.tp_size) - weights)
    return int(KvCacheConfig.free_gpu_memory_fraction * free) * context // plan.sequence_bytes(context, kv)
