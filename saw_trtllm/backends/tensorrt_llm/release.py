"""Whether a TensorRT-LLM with the engine backend is here."""

from __future__ import annotations

import importlib

from saw_trtllm.errors import BackendUnavailableError

#: The engine backend was removed after it.
LAST_RELEASE = "1.2.1"

#: Modules that the swap builds on, and that went with the engine backend.
_MODULES = ("tensorrt_llm.builder", "tensorrt_llm.layers.attention", "tensorrt_llm.graph_rewriting")


def require_engine_backend() -> str:
    """Import TensorRT-LLM and give its version.

    Raises
    ------
    BackendUnavailableError
        If it is not installed, or a release without the engine backend.
    """
    try:
        package = importlib.import_module("tensorrt_llm")
    except ImportError as e:
        raise BackendUnavailableError(
            f"the backend tensorrt_llm needs TensorRT-LLM {LAST_RELEASE}, which cannot be imported here ({e}): "
            "pip install 'saw-trtllm[trtllm]' where there is a GPU, or use --backend reference, which runs on any CPU"
        ) from e
    try:
        for name in _MODULES:
            importlib.import_module(name)
    except ModuleNotFoundError as e:
        if not str(e.name).startswith("tensorrt_llm"):
            raise
        raise BackendUnavailableError(
            f"TensorRT-LLM {package.__version__} has no engine backend (no {e.name}): install {LAST_RELEASE}, the last "
            "release that has it"
        ) from e
    return package.__version__
