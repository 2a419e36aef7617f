# ruff: noqa: N801, N802, N815 - CUDA's names
"""A stand-in for ``cuda.bindings.runtime``: the host's memory plays the GPU's, and a stream is a list of what to do.

Nothing on a stream happens before somebody waits for it, and then all of it does, in order: what is overwritten too
early, or read too early, shows. A graph is what was put on a stream while it was captured. Memory is poisoned when it
is allocated, and addresses are checked.
"""

from __future__ import annotations

import ctypes
import enum
import sys
import time
import types
from collections.abc import Callable
from typing import Any

import numpy as np

TOTAL = 1 << 30


class cudaError_t(enum.IntEnum):
    cudaSuccess = 0
    cudaErrorMemoryAllocation = 2
    cudaErrorNotReady = 600
    cudaErrorIllegalAddress = 700
    cudaErrorInsufficientDriver = 35
    cudaErrorNoDevice = 100
    cudaErrorStreamCaptureUnsupported = 900


class cudaMemcpyKind(enum.IntEnum):
    cudaMemcpyHostToDevice = 1
    cudaMemcpyDeviceToHost = 2
    cudaMemcpyDeviceToDevice = 3


class cudaStreamCaptureMode(enum.IntEnum):
    cudaStreamCaptureModeThreadLocal = 1


class cudaDeviceAttr(enum.IntEnum):
    cudaDevAttrComputeCapabilityMajor = 75
    cudaDevAttrComputeCapabilityMinor = 76


class _Stream:
    def __init__(self) -> None:
        self.work: list[Callable[[], None]] = []
        self.capturing: list[Callable[[], None]] | None = None

    def put(self, action: Callable[[], None]) -> None:
        (self.work if self.capturing is None else self.capturing).append(action)

    def run(self) -> None:
        while self.work:
            self.work.pop(0)()


class Cuda:
    """The module."""

    cudaError_t = cudaError_t
    cudaMemcpyKind = cudaMemcpyKind
    cudaStreamCaptureMode = cudaStreamCaptureMode
    cudaDeviceAttr = cudaDeviceAttr
    cudaStreamNonBlocking = cudaEventDisableTiming = cudaEventBlockingSync = 1
    cudaHostRegisterDefault = 0

    def __init__(self, total: int = TOTAL) -> None:
        self.total = total
        #: Error that functions of some names give.
        self.failing: dict[str, cudaError_t] = {}
        self.device: dict[int, Any] = {}
        self.pinned: dict[int, Any] = {}
        self.streams: dict[int, _Stream] = {}
        self.events: dict[int, tuple[_Stream, int] | None] = {}
        self.graphs: dict[int, list] = {}
        self.launched = 0
        self._next = 1 << 8

    def __getattribute__(self, name: str) -> Any:
        value = super().__getattribute__(name)
        if not name.startswith("cuda") or not callable(value) or isinstance(value, type):
            return value

        def function(*args: Any) -> tuple:
            if name in self.failing:
                return (self.failing[name], None)
            return value(*args)

        function.__name__ = name
        return function

    @property
    def used(self) -> int:
        """Bytes of the GPU that are allocated."""
        return sum(len(buffer) for buffer in self.device.values())

    def cudaDriverGetVersion(self):
        return cudaError_t.cudaSuccess, 12040

    def cudaGetErrorString(self, error):
        return cudaError_t.cudaSuccess, {2: b"out of memory", 700: b"an illegal memory access"}.get(error, b"failed")

    def cudaGetLastError(self):
        return (cudaError_t.cudaSuccess,)

    def cudaRuntimeGetVersion(self):
        return cudaError_t.cudaSuccess, 13000

    def cudaGetDevice(self):
        return cudaError_t.cudaSuccess, 0

    def cudaSetDevice(self, device):
        assert device == 0
        return (cudaError_t.cudaSuccess,)

    def cudaDeviceGetAttribute(self, attribute, device):
        return cudaError_t.cudaSuccess, {75: 9, 76: 0}[attribute]

    def cudaMemGetInfo(self):
        return cudaError_t.cudaSuccess, self.total - self.used, self.total

    def cudaMalloc(self, size):
        if size > self.total - self.used:
            return cudaError_t.cudaErrorMemoryAllocation, None
        return self._allocate(self.device, size)

    def cudaMallocHost(self, size):
        return self._allocate(self.pinned, size)

    def _allocate(self, where, size):
        # Aligned as CUDA's: what is meant to be aligned is so only if its offset is.
        buffer = (ctypes.c_char * (size + 256))()
        address = -(-ctypes.addressof(buffer) // 256) * 256
        ctypes.memset(address, 0xEE, size)
        where[address] = memoryview(buffer).cast("B")[address - ctypes.addressof(buffer) :][:size]
        return cudaError_t.cudaSuccess, address

    def cudaFree(self, address):
        for stream in self.streams.values():
            stream.run()
        del self.device[address]
        return (cudaError_t.cudaSuccess,)

    def cudaFreeHost(self, address):
        del self.pinned[address]
        return (cudaError_t.cudaSuccess,)

    def cudaHostRegister(self, address, size, flags):
        assert address not in self.pinned
        self.pinned[address] = memoryview((ctypes.c_char * size).from_address(address)).cast("B")
        return (cudaError_t.cudaSuccess,)

    cudaHostUnregister = cudaFreeHost

    def cudaMemset(self, address, value, size):
        self.on_device(address, size)
        ctypes.memset(address, value, size)
        return (cudaError_t.cudaSuccess,)

    def cudaMemsetAsync(self, address, value, size, stream):
        self.on_device(address, size)
        self.streams[stream].put(lambda: ctypes.memset(address, value, size))
        return (cudaError_t.cudaSuccess,)

    def cudaMemcpy(self, target, source, size, kind):
        up = kind == cudaMemcpyKind.cudaMemcpyHostToDevice
        self.on_device(target if up else source, size)
        ctypes.memmove(target, source, size)
        return (cudaError_t.cudaSuccess,)

    def cudaStreamCreateWithFlags(self, flags):
        return cudaError_t.cudaSuccess, self._new(self.streams, _Stream())

    def cudaStreamDestroy(self, stream):
        del self.streams[stream]
        return (cudaError_t.cudaSuccess,)

    def cudaStreamSynchronize(self, stream):
        assert self.streams[stream].capturing is None
        self.streams[stream].run()
        return (cudaError_t.cudaSuccess,)

    def cudaMemcpyAsync(self, target, source, size, kind, stream):
        kinds = cudaMemcpyKind
        (self.on_device if kind != kinds.cudaMemcpyDeviceToHost else self.on_host)(target, size)
        (self.on_device if kind != kinds.cudaMemcpyHostToDevice else self.on_host)(source, size)
        self.streams[stream].put(lambda: ctypes.memmove(target, source, size))
        return (cudaError_t.cudaSuccess,)

    def cudaMemcpy2DAsync(self, target, target_pitch, source, source_pitch, width, height, kind, stream):
        assert width <= min(target_pitch, source_pitch)
        for row in range(height):
            self.cudaMemcpyAsync(target + row * target_pitch, source + row * source_pitch, width, kind, stream)
        return (cudaError_t.cudaSuccess,)

    def cudaEventCreateWithFlags(self, flags):
        return cudaError_t.cudaSuccess, self._new(self.events, None)

    def cudaEventCreate(self):
        return self.cudaEventCreateWithFlags(0)

    def cudaEventDestroy(self, event):
        del self.events[event]
        return (cudaError_t.cudaSuccess,)

    def cudaEventRecord(self, event, stream):
        stream, done = self.streams[stream], []
        stream.put(lambda: done.append(time.perf_counter()))
        self.events[event] = (stream, done)
        return (cudaError_t.cudaSuccess,)

    def cudaEventSynchronize(self, event):
        if self.events[event] is not None:
            stream, done = self.events[event]
            while not done:
                stream.work.pop(0)()
        return (cudaError_t.cudaSuccess,)

    def cudaEventQuery(self, event):
        """Each question finds the stream one piece of work further."""
        stream, done = self.events[event]
        if not done:
            stream.work.pop(0)()
        return (cudaError_t.cudaSuccess if done else cudaError_t.cudaErrorNotReady,)

    def cudaStreamWaitEvent(self, stream, event, flags):
        if self.events[event] is None:  # never recorded
            return (cudaError_t.cudaSuccess,)
        other, done = self.events[event]

        def wait():
            while not done:
                other.work.pop(0)()

        self.streams[stream].put(wait)
        return (cudaError_t.cudaSuccess,)

    def cudaEventElapsedTime(self, start, end):
        (_, (first,)), (_, (last,)) = self.events[start], self.events[end]
        return cudaError_t.cudaSuccess, 1e3 * (last - first)

    def cudaStreamBeginCapture(self, stream, mode):
        self.streams[stream].capturing = []
        return (cudaError_t.cudaSuccess,)

    def cudaStreamEndCapture(self, stream):
        recorded, self.streams[stream].capturing = self.streams[stream].capturing, None
        return cudaError_t.cudaSuccess, self._new(self.graphs, recorded)

    def cudaGraphInstantiate(self, graph, flags):
        return cudaError_t.cudaSuccess, self._new(self.graphs, self.graphs[graph])

    def cudaGraphLaunch(self, graph, stream):
        self.launched += 1
        self.streams[stream].work.extend(self.graphs[graph])
        return (cudaError_t.cudaSuccess,)

    def cudaGraphDestroy(self, graph):
        del self.graphs[graph]
        return (cudaError_t.cudaSuccess,)

    cudaGraphExecDestroy = cudaGraphDestroy

    def on_device(self, address: int, size: int) -> None:
        """Raise unless so many bytes from an address on lie in one allocation of the GPU's memory."""
        assert self._inside(self.device, address, size), f"{size} bytes at {address:#x} are not the GPU's"

    def on_host(self, address: int, size: int) -> None:
        """The same of pinned memory."""
        assert self._inside(self.pinned, address, size), f"{size} bytes at {address:#x} are not pinned"

    def array(self, address: int, dtype: Any, shape: tuple[int, ...]) -> np.ndarray:
        """A view of the GPU's memory."""
        size = int(np.prod(shape)) * np.dtype(dtype).itemsize
        self.on_device(address, size)
        return np.frombuffer((ctypes.c_char * size).from_address(address), dtype).reshape(shape)

    def rest(self, address: int) -> memoryview:
        """The GPU's memory from an address to the end of its allocation."""
        base = max(base for base in self.device if base <= address)
        return self.device[base][address - base :]

    def everything(self) -> list[int]:
        """Handles and addresses of all that was not given back."""
        return [*self.device, *self.pinned, *self.streams, *self.events, *self.graphs]

    @staticmethod
    def _inside(where, address, size):
        return any(base <= address and address + size <= base + len(buffer) for base, buffer in list(where.items()))

    def _new(self, where, value):
        self._next += 1
        where[self._next] = value
        return self._next


#: Modules of the backend that hold what they were given by CUDA: each test imports its own.
_OVER_CUDA = (
    "cuda",
    "engine_checks",
    "executor",
    "graphs",
    "host_pool",
    "memory",
    "refit",
    "results",
    "sample_rows",
    "sampler",
    "session",
    "staging",
    "weights",
)


def install(monkeypatch: Any, total: int = TOTAL) -> Cuda:
    """Put the stand-in in the place of CUDA for Python until the test ends, for modules that are imported after it."""
    cuda = Cuda(total)
    for name in _OVER_CUDA:
        # What is imported over the stand-in goes with it, also where nothing had been imported before.
        monkeypatch.setitem(sys.modules, f"saw_trtllm.backends.tensorrt.{name}", None)
        del sys.modules[f"saw_trtllm.backends.tensorrt.{name}"]
        # And from the package, where the last stand-in's would be found first.
        monkeypatch.delattr(f"saw_trtllm.backends.tensorrt.{name}", raising=False)
    package, bindings = types.ModuleType("cuda"), types.ModuleType("cuda.bindings")
    package.bindings, bindings.runtime = bindings, cuda
    for name, module in (("cuda", package), ("cuda.bindings", bindings), ("cuda.bindings.runtime", cuda)):
        monkeypatch.setitem(sys.modules, name, module)
    monkeypatch.setattr("saw_trtllm.backends.tensorrt.device.check_kernels", lambda: None)  # they are not built
    return cuda
