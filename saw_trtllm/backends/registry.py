"""Which backend an engine is built for: what this machine has, and what a backend cannot have."""

from __future__ import annotations

import importlib.util
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import psutil

from saw_trtllm.backends.tensorrt import device
from saw_trtllm.backends.tensorrt.versions import TensorRT
from saw_trtllm.backends.tensorrt_llm.release import require_engine_backend
from saw_trtllm.engine.config import BackendName, EngineConfig
from saw_trtllm.errors import BackendUnavailableError, ConfigError, EngineError
from saw_trtllm.model.config import ModelConfig
from saw_trtllm.plugins.library import library_path
from saw_trtllm.runtime.executor import Executor
from saw_trtllm.runtime.kv_cache_config import KvCacheConfig


def choose_backend(asked: str) -> tuple[BackendName, str]:
    """Settle on a backend.

    Parameters
    ----------
    asked : str
        A backend's name, or ``auto``: TensorRT where it, a GPU and the plugins are, for TensorRT-LLM if that is
        installed beside it; else the reference.

    Returns
    -------
    tuple of (str, str)
        The backend, and why.

    Raises
    ------
    BackendUnavailableError
        If the one asked for is not to be had.
    """
    if asked == "tensorrt_llm":
        version = require_engine_backend()
        return "tensorrt_llm", f"asked for; TensorRT-LLM {version}"
    if asked == "tensorrt":
        return "tensorrt", f"asked for; {_require_tensorrt()}"
    why = "asked for"
    if asked == "auto":
        try:
            found = _require_tensorrt()
            version = _tensorrt_llm_version()
            if version is not None:
                return "tensorrt_llm", f"the best here; {found}, for TensorRT-LLM {version}"
            return "tensorrt", f"the best here; {found}"
        except BackendUnavailableError as e:
            # What is the matter, without what to do about it.
            why = f"the default; {str(e).rpartition(': ')[0]}"
    if importlib.util.find_spec("torch") is None:
        raise BackendUnavailableError(
            "the reference backend needs PyTorch, which is not installed: pip install 'saw-trtllm[reference]'"
        )
    return "reference", why


def check_model(backend: BackendName, model: ModelConfig) -> None:
    """Refuse a dtype that a backend's plugins, or its TensorRT, cannot compute in.

    Raises
    ------
    ConfigError
    """
    if backend == "tensorrt":
        TensorRT.load().check_activations(model.dtype)
    elif backend == "tensorrt_llm" and model.dtype == "float32":
        raise ConfigError("the model is in float32, and the plugins compute in 16 bits: give --dtype float16")


def free_memory(backend: BackendName) -> int:
    """Bytes that are free where a backend keeps its weights and its cache."""
    return device.free_memory() if backend == "tensorrt" else psutil.virtual_memory().available


def _require_tensorrt() -> str:
    """What builds and runs TensorRT engines here, in words."""
    tensorrt = TensorRT.load()
    library_path()
    device.compute_capability()
    return f"TensorRT {tensorrt.version} on {device.gpu_name()}"


def _tensorrt_llm_version() -> str | None:
    """That of a TensorRT-LLM which serves engines, if one is installed."""
    try:
        return require_engine_backend()
    except (BackendUnavailableError, ImportError):  # or what it needs is missing
        return None


def open_executor(folder: Path, config: EngineConfig, kv_cache: KvCacheConfig) -> Executor:
    """The executor of an engine's backend.

    Raises
    ------
    EngineError, BackendUnavailableError
        If this machine cannot run the engine.
    """
    backend = config.saw_int4.backend
    options = (kv_cache.max_tokens, kv_cache.free_gpu_memory_fraction)
    if backend == "reference":
        from saw_trtllm.backends.reference.executor import ReferenceExecutor

        # In a thread that ends. OpenMP keeps workers for each living thread that has computed, and once they outnumber
        # the cores they sleep between products: the engine's thread, which runs the steps, would take twice as long.
        with ThreadPoolExecutor(1) as thread:
            return thread.submit(ReferenceExecutor, folder, config, *options).result()
    if backend == "tensorrt":
        from saw_trtllm.backends.tensorrt.executor import TensorRTExecutor

        return TensorRTExecutor(folder, config, *options)
    raise EngineError(
        f"the engine in {folder} was built for the backend {backend}, which TensorRT-LLM's own runtime runs: build it "
        "with --backend tensorrt or reference"
    )
