"""Which engines this machine can run: others are rejected before the GPU's memory is taken, in one sentence."""

from __future__ import annotations

import mmap
from pathlib import Path
from typing import Any

from saw_trtllm.backends.tensorrt import device
from saw_trtllm.backends.tensorrt.constants import weight_inputs
from saw_trtllm.backends.tensorrt.cuda import memory_info
from saw_trtllm.backends.tensorrt.profiles import step_inputs
from saw_trtllm.backends.tensorrt.refit import refit
from saw_trtllm.backends.tensorrt.versions import TensorRT
from saw_trtllm.backends.tensorrt.weights import DeviceWeights, stored_weights
from saw_trtllm.engine.config import CONFIG_FILE, EngineConfig, engine_file, weights_file
from saw_trtllm.engine.tensors import LOGITS
from saw_trtllm.errors import BackendUnavailableError, EngineError
from saw_trtllm.paths import is_file
from saw_trtllm.plan.weights import stripped_weights
from saw_trtllm.plugins import library

_AGAIN = "build it anew with saw-build on this machine"
#: Tensors that a message names: all weights may be others.
_NAMED = 3


def check_versions(folder: Path, config: EngineConfig, tensorrt: TensorRT) -> None:
    """Reject an engine of other plugins, another TensorRT or another GPU, or of plugins whose library is not there.

    Raises
    ------
    EngineError
        If one of them does not match.
    BackendUnavailableError
        If there is no GPU, no kernel for it, or no cuBLASLt for an engine that needs it.
    """
    section = config.saw_int4
    if section.plugin_version != library.VERSION:
        raise EngineError(
            f"the engine in {folder} was built with version {section.plugin_version} of the plugins and this runtime "
            f"has version {library.VERSION}: {_AGAIN}"
        )
    if section.tensorrt_version != tensorrt.version:
        raise EngineError(
            f"the engine in {folder} was built with TensorRT {section.tensorrt_version} and TensorRT "
            f"{tensorrt.version} is installed: {_AGAIN}, or install that version"
        )
    found = device.compute_capability()
    if section.compute_capability != found:
        raise EngineError(
            f"the engine in {folder} was built for a GPU of compute capability {section.compute_capability} and this "
            f"one has {found}: {_AGAIN}"
        )
    device.check_kernels()
    needs_cublas_lt = section.quantized or config.build_config.plugin_config.gemm_plugin is not None
    if needs_cublas_lt and not library.load_cublas_lt():
        raise BackendUnavailableError(
            f"the engine in {folder} has its GEMMs from cuBLASLt, which cannot be loaded: {library.CUBLAS_LT}"
        )


def read_engine(
    folder: Path, config: EngineConfig, tensorrt: TensorRT, runtime: Any, logger: Any, rank: int = 0
) -> tuple[Any, DeviceWeights]:
    """Read a rank's engine onto the GPU, and all its weights.

    Parameters
    ----------
    folder : Path
    config : EngineConfig
        Of all ranks.
    tensorrt : TensorRT
        With the plugins loaded.
    runtime : tensorrt.Runtime
    logger : tensorrt.ILogger
        The runtime's.
    rank : int

    Returns
    -------
    engine : tensorrt.ICudaEngine
    weights : DeviceWeights
        Those that are its inputs.

    Raises
    ------
    EngineError
        If a file is not there or not whole, it is of another config, or the GPU has no room for it.
    """
    path = folder / engine_file(rank)
    if not is_file(path, EngineError):
        raise EngineError(f"{path} does not exist: {_AGAIN}")
    stripped = config.saw_int4.weights is not None
    weights = stripped_weights(folder, config).of_rank(rank) if stripped else None
    specs = weight_inputs(config)
    stored = stored_weights(folder / weights_file(rank), {} if stripped else specs)
    beside = sum(spec.nbytes for spec in specs.values())
    try:
        size = path.stat().st_size + beside if weights is None else weights.nbytes
        # Mapped: TensorRT reads through it once, so a second copy of the weights in memory would be for nothing.
        with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
            free = memory_info()[0]
            engine = runtime.deserialize_cuda_engine(data)
    except (OSError, ValueError) as e:  # mmap's word for an empty file is ValueError
        reason = getattr(e, "strerror", None) or e
        raise EngineError(f"{path} cannot be read as an engine ({reason}): {_AGAIN}") from e
    if size > free and (engine is None or beside > memory_info()[0]):
        raise EngineError(
            f"{path} holds {gib(size)} of weights and kernels and the GPU has {gib(free)} free: free memory there, or "
            "use a larger GPU"
        )
    if engine is None:
        raise EngineError(f"{path} cannot be read as an engine ({logger.reason}): {_AGAIN}")
    _check_tensors(path, config, tensorrt, engine)
    if weights is not None:
        return engine, refit(path, weights, tensorrt, engine, logger)
    return engine, DeviceWeights(specs, stored)


def gib(nbytes: int) -> str:
    """Bytes in words."""
    return f"{nbytes / 2**30:.2f} GiB" if nbytes >= 1 << 26 else f"{nbytes / 2**20:.2f} MiB"


def _check_tensors(path: Path, config: EngineConfig, tensorrt: TensorRT, engine: Any) -> None:
    """Compare what the engine has with what its config says: a folder's two files may come from two builds."""
    due = {
        x.name: (tensorrt.dtype(x.dtype), tuple(-1 if isinstance(d, str) else d for d in x.shape))
        for x in step_inputs(config.of_rank(), tensorrt)
    }
    due |= {name: (tensorrt.dtype(spec.dtype), spec.shape) for name, spec in weight_inputs(config).items()}
    names = [engine.get_tensor_name(i) for i in range(engine.num_io_tensors)]
    found = {name: (engine.get_tensor_dtype(name), tuple(engine.get_tensor_shape(name))) for name in names}
    logits = found.pop(LOGITS.name, None)
    if found != due or logits is None or logits[1] != (-1, config.pretrained_config.vocab_size):
        different = sorted(n for n in found.keys() | due.keys() if found.get(n) != due.get(n)) or [LOGITS.name]
        named = ", ".join(different[:_NAMED])
        if len(different) > _NAMED:
            named += f" and {len(different) - _NAMED} others"
        raise EngineError(f"{path} is not of its {CONFIG_FILE}, which says otherwise of {named}: {_AGAIN}")
    if logits[0] != tensorrt.dtype(LOGITS.dtype):
        raise EngineError(
            f"{path} gives logits that are not float32, from which this runtime samples: build it from a checkpoint "
            "whose config.json has no other logits_dtype"
        )
