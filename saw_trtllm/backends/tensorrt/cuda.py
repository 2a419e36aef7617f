"""What the executor asks of CUDA, and the one place that turns its error codes into sentences."""

from __future__ import annotations

import ctypes
import math
import mmap
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from copy import copy
from typing import Any

import numpy as np

from saw_trtllm.errors import BackendUnavailableError, KernelError

try:
    from cuda.bindings import runtime
except ImportError as e:
    raise BackendUnavailableError(
        f"CUDA for Python cannot be imported here ({e}): pip install 'saw-trtllm[tensorrt]' on a machine with a GPU; "
        "an engine of saw-build --backend reference runs on any CPU"
    ) from e

#: TensorRT wants the tensors of an engine at multiples of so many bytes.
ALIGNMENT = 256

_HUGE_PAGE = 2 << 20

#: What says that there is nothing to run on, rather than that something went wrong.
_NO_GPU = ("cudaErrorNoDevice", "cudaErrorInitializationError", "cudaErrorStubLibrary")


def call(function: Callable[..., tuple], *args: Any) -> Any:
    """Call a function of the CUDA runtime.

    Returns
    -------
    object
        What it gives beside its error code: None, a value, or a list of them.

    Raises
    ------
    BackendUnavailableError
        If there is no GPU, or the driver is too old.
    KernelError
        If CUDA reports anything else.
    """
    error, *values = function(*args)
    if error != runtime.cudaError_t.cudaSuccess:
        if error.name == "cudaErrorInsufficientDriver":
            raise BackendUnavailableError(
                f"the NVIDIA driver knows CUDA {_cuda_version(runtime.cudaDriverGetVersion)} and CUDA for Python is "
                f"{_cuda_version(runtime.cudaRuntimeGetVersion)}: update the driver, or install the cuda-python and "
                "the TensorRT of its CUDA"
            )
        if error.name in _NO_GPU:
            raise BackendUnavailableError(
                f"CUDA finds no GPU ({error.name}): an engine of TensorRT needs one and its driver; one of saw-build "
                "--backend reference runs on any CPU"
            )
        _, text = runtime.cudaGetErrorString(error)
        reason = text.decode() if isinstance(text, bytes) else text
        raise KernelError(f"{function.__name__} failed: {reason} ({error.name})")
    return values[0] if len(values) == 1 else values or None


def _cuda_version(function: Callable[..., tuple]) -> str:
    """A version as in 13.0; the driver of a machine without one is 0.0."""
    number = function()[1] or 0
    return f"{number // 1000}.{number % 1000 // 10}"


def align(nbytes: int) -> int:
    """The next multiple of :data:`ALIGNMENT`."""
    return -(-nbytes // ALIGNMENT) * ALIGNMENT


def memory_info() -> tuple[int, int]:
    """Free and total bytes of the GPU in use."""
    free, total = call(runtime.cudaMemGetInfo)
    return free, total


class Stream:
    """A stream of its own, which does not wait for the default one.

    Attributes
    ----------
    handle : int
    """

    def __init__(self) -> None:
        self.handle = int(call(runtime.cudaStreamCreateWithFlags, runtime.cudaStreamNonBlocking))

    def synchronize(self) -> None:
        """Wait for all that was put on it."""
        call(runtime.cudaStreamSynchronize, self.handle)

    def upload(self, address: int, source: int, nbytes: int) -> None:
        """Copy from pinned memory to the GPU, in the stream's order."""
        call(
            runtime.cudaMemcpyAsync, address, source, nbytes, runtime.cudaMemcpyKind.cudaMemcpyHostToDevice, self.handle
        )

    def upload_rows(self, address: int, pitch: int, source: int, width: int, rows: int) -> None:
        """Copy ``rows`` of ``width`` bytes that lie close together to where one begins each ``pitch`` bytes."""
        kind = runtime.cudaMemcpyKind.cudaMemcpyHostToDevice
        call(runtime.cudaMemcpy2DAsync, address, pitch, source, width, width, rows, kind, self.handle)

    def copy_rows(self, target: int, source: int, pitch: int, width: int, rows: int) -> None:
        """Copy ``rows`` of ``width`` bytes, one of which begins each ``pitch`` bytes, within the GPU."""
        kind = runtime.cudaMemcpyKind.cudaMemcpyDeviceToDevice
        call(runtime.cudaMemcpy2DAsync, target, pitch, source, pitch, width, rows, kind, self.handle)

    def download(self, target: int, address: int, nbytes: int) -> None:
        """Copy from the GPU to pinned memory, in the stream's order."""
        call(
            runtime.cudaMemcpyAsync, target, address, nbytes, runtime.cudaMemcpyKind.cudaMemcpyDeviceToHost, self.handle
        )

    def wait_for(self, event: Event) -> None:
        """Let what comes next wait until the GPU has come to an event, as it was recorded last; not if it never was."""
        call(runtime.cudaStreamWaitEvent, self.handle, event.handle, 0)

    @contextmanager
    def capture(self) -> Iterator[Graph]:
        """Record what is put on the stream instead of running it."""
        # Only this thread's calls are watched: another may well allocate meanwhile.
        call(
            runtime.cudaStreamBeginCapture, self.handle, runtime.cudaStreamCaptureMode.cudaStreamCaptureModeThreadLocal
        )
        graph = Graph()
        try:
            yield graph
        except BaseException:
            runtime.cudaStreamEndCapture(self.handle)  # which fails too, and says less
            runtime.cudaGetLastError()
            raise
        recorded = call(runtime.cudaStreamEndCapture, self.handle)
        try:
            graph.executable = call(runtime.cudaGraphInstantiate, recorded, 0)
        finally:
            call(runtime.cudaGraphDestroy, recorded)

    def close(self) -> None:
        """Destroy it."""
        if self.handle:
            handle, self.handle = self.handle, 0
            call(runtime.cudaStreamDestroy, handle)


class Graph:
    """What :meth:`Stream.capture` recorded."""

    executable: Any = None

    def launch(self, stream: Stream) -> None:
        """Run it."""
        call(runtime.cudaGraphLaunch, self.executable, stream.handle)

    def close(self) -> None:
        """Destroy it."""
        if self.executable is not None:
            executable, self.executable = self.executable, None
            call(runtime.cudaGraphExecDestroy, executable)


class Event:
    """A point in a stream's order."""

    def __init__(self) -> None:
        # Without times it is cheaper; a thread that waits for it sleeps, since the host has other things to do.
        flags = runtime.cudaEventDisableTiming | runtime.cudaEventBlockingSync
        self.handle = call(runtime.cudaEventCreateWithFlags, flags)

    def record(self, stream: Stream) -> None:
        """Let it be the point that the stream has come to."""
        call(runtime.cudaEventRecord, self.handle, stream.handle)

    def synchronize(self) -> None:
        """Wait until the GPU has come there. Other threads go on."""
        call(runtime.cudaEventSynchronize, self.handle)

    def is_done(self) -> bool:
        """Whether the GPU has come there."""
        (error,) = runtime.cudaEventQuery(self.handle)
        if error == runtime.cudaError_t.cudaErrorNotReady:
            return False
        call(lambda: (error,))
        return True

    def close(self) -> None:
        """Destroy it."""
        if self.handle is not None:
            handle, self.handle = self.handle, None
            call(runtime.cudaEventDestroy, handle)


class DeviceBuffer:
    """Memory of the GPU.

    Attributes
    ----------
    address, nbytes : int
    """

    def __init__(self, nbytes: int) -> None:
        self.nbytes = nbytes
        self.address = int(call(runtime.cudaMalloc, max(nbytes, 1)))

    def fill(self, value: int) -> None:
        """Set every byte, and wait."""
        call(runtime.cudaMemset, self.address, value, self.nbytes)

    def write(self, array: np.ndarray, offset: int = 0) -> None:
        """Copy an array there, and wait."""
        array = np.ascontiguousarray(array)
        kind = runtime.cudaMemcpyKind.cudaMemcpyHostToDevice
        call(runtime.cudaMemcpy, self.address + offset, array.ctypes.data, array.nbytes, kind)

    def read(self, dtype: Any, shape: Sequence[int], offset: int = 0) -> np.ndarray:
        """A copy of an array that lies there, when all that came before it is done."""
        array = np.empty(shape, dtype)
        kind = runtime.cudaMemcpyKind.cudaMemcpyDeviceToHost
        call(runtime.cudaMemcpy, array.ctypes.data, self.address + offset, array.nbytes, kind)
        return array

    def part(self, offset: int, nbytes: int) -> DeviceBuffer:
        """Some of it, which lasts as long as the whole and need not be closed."""
        part = copy(self)
        part.address, part.nbytes = self.address + offset, nbytes
        return part

    def close(self) -> None:
        """Free it."""
        if self.address:
            address, self.address = self.address, 0
            call(runtime.cudaFree, address)


class _HostBuffer:
    """Memory of the host, at an address.

    Attributes
    ----------
    address, nbytes : int
    """

    address: int
    nbytes: int

    def array(self, dtype: Any, shape: Sequence[int], offset: int = 0) -> np.ndarray:
        """A view as an array. It must not be used once the buffer is closed."""
        dtype = np.dtype(dtype)
        size = math.prod(shape) * dtype.itemsize
        if offset + size > self.nbytes:
            raise ValueError(f"{offset} + {size} bytes of a buffer of {self.nbytes}")
        memory = (ctypes.c_char * size).from_address(self.address + offset)
        return np.frombuffer(memory, dtype).reshape(shape)


class PinnedBuffer(_HostBuffer):
    """Host memory that the GPU copies from and to by itself."""

    def __init__(self, nbytes: int) -> None:
        self.nbytes = nbytes
        self.address = int(call(runtime.cudaMallocHost, max(nbytes, 1)))

    def grown(self, nbytes: int) -> PinnedBuffer:
        """A buffer of at least so many bytes: this one, or a new one, for which this is freed if it can be had."""
        if self.nbytes >= nbytes:
            return self
        buffer = PinnedBuffer(nbytes)
        self.close()
        return buffer

    def close(self) -> None:
        """Free it."""
        if self.address:
            address, self.address = self.address, 0
            call(runtime.cudaFreeHost, address)


class RegisteredBuffer(_HostBuffer):
    """The same in two parts, of which the longer needs nothing of CUDA: pages that are there, and their pinning."""

    def __init__(self, nbytes: int) -> None:
        self.nbytes = nbytes
        # Of huge pages hundreds of times fewer are made, and pinned.
        self._pages = mmap.mmap(-1, nbytes + _HUGE_PAGE, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        with suppress(OSError):  # a kernel without them
            self._pages.madvise(mmap.MADV_HUGEPAGE)
        first = ctypes.addressof(ctypes.c_char.from_buffer(self._pages))
        self.address = -(-first // _HUGE_PAGE) * _HUGE_PAGE
        self._is_pinned = False
        ctypes.memset(self.address, 0, nbytes)  # other threads of Python go on meanwhile

    def pin(self) -> None:
        """Let the GPU copy from and to it by itself."""
        call(runtime.cudaHostRegister, self.address, self.nbytes, runtime.cudaHostRegisterDefault)
        self._is_pinned = True

    def close(self) -> None:
        """Let go of it, once nobody has an array of it any more."""
        if self.address:
            address, self.address = self.address, 0
            if self._is_pinned:
                call(runtime.cudaHostUnregister, address)
            self._pages.close()
