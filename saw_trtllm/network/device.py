"""The GPU in use, asked through CUDA for Python."""

from __future__ import annotations

from typing import Any

from saw_trtllm.errors import BackendUnavailableError


def compute_capability() -> str:
    """That of the GPU in use, as in 9.0.

    Raises
    ------
    BackendUnavailableError
        If CUDA for Python is not installed, or there is no GPU.
    """
    runtime = _runtime()
    device = _call(runtime, "cudaGetDevice")
    attributes = (getattr(runtime.cudaDeviceAttr, f"cudaDevAttrComputeCapability{x}") for x in ("Major", "Minor"))
    return ".".join(str(_call(runtime, "cudaDeviceGetAttribute", attribute, device)) for attribute in attributes)


def gpu_name() -> str:
    """That of the GPU in use, as in NVIDIA H200; raises as :func:`compute_capability`."""
    runtime = _runtime()
    name = _call(runtime, "cudaGetDeviceProperties", _call(runtime, "cudaGetDevice")).name
    return name.decode() if isinstance(name, bytes) else str(name)


def free_memory() -> int:
    """Free bytes of the GPU in use; raises as :func:`compute_capability`."""
    return _call(_runtime(), "cudaMemGetInfo")[0]


def _runtime() -> Any:
    try:
        from cuda.bindings import runtime
    except ImportError as e:
        raise BackendUnavailableError(
            f"CUDA for Python cannot be imported here ({e}): pip install 'saw-trtllm[tensorrt]'"
        ) from e
    return runtime


def _call(runtime: Any, function: str, *arguments: Any) -> Any:
    error, *values = getattr(runtime, function)(*arguments)
    if error != runtime.cudaError_t.cudaSuccess:
        raise BackendUnavailableError(
            f"CUDA finds no GPU ({error.name}): use --backend reference, which runs on any CPU"
        )
    return values[0] if len(values) == 1 else values
