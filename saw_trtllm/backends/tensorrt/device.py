"""The GPU in use. All of it raises BackendUnavailableError where there is none, or no CUDA for Python."""

from __future__ import annotations

from saw_trtllm.plugins.kernels import KernelsLibrary


def compute_capability() -> str:
    """Its compute capability, as in 9.0."""
    from saw_trtllm.backends.tensorrt.cuda import call, runtime

    device = call(runtime.cudaGetDevice)
    attributes = (getattr(runtime.cudaDeviceAttr, f"cudaDevAttrComputeCapability{x}") for x in ("Major", "Minor"))
    return ".".join(str(call(runtime.cudaDeviceGetAttribute, attribute, device)) for attribute in attributes)


def gpu_name() -> str:
    """Its name, as in NVIDIA H200."""
    from saw_trtllm.backends.tensorrt.cuda import call, runtime

    name = call(runtime.cudaGetDeviceProperties, call(runtime.cudaGetDevice)).name
    return name.decode() if isinstance(name, bytes) else str(name)


def check_kernels() -> None:
    """Reject a GPU that the kernels were not built for."""
    major, minor = map(int, compute_capability().split("."))
    KernelsLibrary.load().check(gpu_name(), (major, minor))


def free_memory() -> int:
    """Its free bytes."""
    from saw_trtllm.backends.tensorrt.cuda import memory_info

    return memory_info()[0]
