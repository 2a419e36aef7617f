"""The ranks of an engine, a GPU and a process each: which GPU is whose, and what their plugins sum with."""

from __future__ import annotations

import ctypes
import logging
import socket
from contextlib import suppress
from typing import Any

import numpy as np

from saw_trtllm.backends.tensorrt.cuda import DeviceBuffer, call, runtime
from saw_trtllm.errors import BackendUnavailableError, EngineError, KernelError
from saw_trtllm.ops.arrays import kernels
from saw_trtllm.plugins.library import NCCL, load_nccl
from saw_trtllm.runtime.collectives import Collectives

log = logging.getLogger(__name__)

#: Of two ranks, sums of so many bytes or fewer go by the one-shot kernel; docs/scale.md has the times of both. Of more,
#: each rank sends at most twice as many to the others together.
ONE_SHOT_BYTES = 1 << 20
#: The first NCCL with all that a captured graph needs.
_OLDEST_NCCL = (2, 18)
_UNIQUE_ID_BYTES = 128
_IPC_HANDLE_BYTES = 64


def use_gpu_of_rank(collectives: Collectives) -> None:
    """Make the GPU of a rank the one in use: of the ranks on a machine, the first has its first, and so on.

    A process that sees one GPU only takes that, as where Ray has given it one.

    Raises
    ------
    EngineError
        If there are not enough.
    """
    hosts = _hosts(collectives)
    place = hosts[: collectives.rank].count(hosts[collectives.rank])
    count = call(runtime.cudaGetDeviceCount)
    call(runtime.cudaSetDevice, place if place < count else 0)
    properties = call(runtime.cudaGetDeviceProperties, call(runtime.cudaGetDevice))
    uuid = np.frombuffer(bytes(properties.uuid.bytes), np.uint8)
    gpus = [bytes(gpu) for gpu in collectives.all_gather(uuid)]
    if len(set(gpus)) < len(gpus):
        raise EngineError(
            f"the engine is split over {collectives.size} ranks, a GPU each, and they have {len(set(gpus))}: run them "
            "on machines with as many GPUs, or build the engine anew with a smaller --tp_size"
        )


def _hosts(collectives: Collectives) -> list[bytes]:
    """What tells the machines of the ranks apart."""
    name = socket.gethostname().encode()[:64].ljust(64, b"\0")
    return [bytes(host) for host in collectives.all_gather(np.frombuffer(name, np.uint8))]


class RankGroup:
    """What the plugins between ranks work with, made known to them for the GPU in use: NCCL, and each other's memory.

    Parameters
    ----------
    collectives : Collectives

    Attributes
    ----------
    one_shot : bool
        Whether small sums go by the one-shot kernel: where every GPU reaches the memory of every other.
    communicator : int
        NCCL's.
    nccl_version : str
    ranks : saw_trtllm._C.Ranks
        What the kernel is given.

    Raises
    ------
    BackendUnavailableError
        If NCCL is missing, or too old.
    EngineError
        If the ranks have different versions of it.
    KernelError
        If it does not join them.
    """

    def __init__(self, collectives: Collectives) -> None:
        self._nccl = _Nccl(collectives)
        self._device = call(runtime.cudaGetDevice)
        self._module = kernels()
        self._opened: list[int] = []
        near = len(set(_hosts(collectives))) == 1 and collectives.size <= self._module.MAX_RANKS
        peers = self._exchange(collectives) if near else []
        self.one_shot, self.communicator = bool(peers), self._nccl.communicator
        self.nccl_version = self._nccl.version
        self.ranks = self._module.Ranks(
            rank=collectives.rank,
            size=collectives.size,
            nccl=self.communicator,
            peers=peers,
            one_shot_bytes=min(ONE_SHOT_BYTES, 2 * ONE_SHOT_BYTES // (collectives.size - 1)),
        )
        self._module.set_ranks(device=self._device, ranks=self.ranks)

    def _exchange(self, collectives: Collectives) -> list[int]:
        """Addresses of all ranks' buffers, or none if some GPU does not reach some other's."""
        buffer = DeviceBuffer(self._module.all_reduce_buffer_bytes(collectives.size))
        buffer.fill(0)
        call(runtime.cudaDeviceSynchronize)
        handle = call(runtime.cudaIpcGetMemHandle, buffer.address)
        # By its bytes: versions of CUDA for Python differ in the names within.
        ours = ctypes.string_at(handle.getPtr(), _IPC_HANDLE_BYTES)
        handles = collectives.all_gather(np.frombuffer(ours, np.uint8))
        addresses, reached = [], True
        for rank, theirs in enumerate(handles):
            if rank == collectives.rank:
                addresses.append(buffer.address)
                continue
            try:
                addresses.append(self._open(theirs))
            except KernelError as e:
                log.info("rank %d does not reach the GPU memory of rank %d: %s", collectives.rank, rank, e)
                reached = False
                break
        return addresses if all(int(x) for x in collectives.all_gather(np.array(int(reached)))) else []

    def _open(self, handle: np.ndarray) -> int:
        theirs = runtime.cudaIpcMemHandle_t()
        ctypes.memmove(theirs.getPtr(), bytes(handle), _IPC_HANDLE_BYTES)
        address = int(call(runtime.cudaIpcOpenMemHandle, theirs, runtime.cudaIpcMemLazyEnablePeerAccess))
        self._opened.append(address)
        return address

    def close(self) -> None:
        """Take it away from the plugins; no step is in flight.

        The buffer stays until the process ends: another rank may have it open yet.
        """
        self._module.set_ranks(device=self._device, ranks=None)
        for address in self._opened:
            with suppress(KernelError):  # of a GPU that failed: NCCL is closed all the same
                call(runtime.cudaIpcCloseMemHandle, address)
        self._nccl.close()


class _UniqueId(ctypes.Structure):
    _fields_ = (("internal", ctypes.c_byte * _UNIQUE_ID_BYTES),)


class _Nccl:
    """A communicator of NCCL over the ranks, on the GPU in use."""

    def __init__(self, collectives: Collectives) -> None:
        library = load_nccl()
        if library is None:
            raise BackendUnavailableError(f"an engine of several ranks needs NCCL, which cannot be loaded: {NCCL}")
        self._library: Any = library
        self._library.ncclGetErrorString.restype = ctypes.c_char_p
        self.version = self._check_version(collectives)
        unique = _UniqueId()
        if collectives.rank == 0:
            self._call("ncclGetUniqueId", ctypes.byref(unique))
        ids = collectives.all_gather(np.frombuffer(bytes(unique), np.uint8))
        unique = _UniqueId.from_buffer_copy(bytes(ids[0]))
        communicator = ctypes.c_void_p()
        size, rank = ctypes.c_int(collectives.size), ctypes.c_int(collectives.rank)
        self._call("ncclCommInitRank", ctypes.byref(communicator), size, unique, rank)
        self.communicator: int = communicator.value or 0

    def _check_version(self, collectives: Collectives) -> str:
        """The version, which all ranks must have."""
        number = ctypes.c_int()
        self._call("ncclGetVersion", ctypes.byref(number))
        version = number.value // 10000, number.value // 100 % 100
        if version < _OLDEST_NCCL:
            raise BackendUnavailableError(
                f"NCCL {_words(version)} is installed and an engine of several ranks needs {_words(_OLDEST_NCCL)} or "
                f"newer: {NCCL}"
            )
        numbers = [int(theirs) for theirs in collectives.all_gather(np.array(number.value))]
        found = [_words((n // 10000, n // 100 % 100, n % 100)) for n in numbers]
        if len(set(numbers)) > 1:
            raise EngineError(f"the ranks have NCCL {', '.join(found)}: install one version on all machines")
        return found[0]

    def close(self) -> None:
        # An abort, since the other ranks may be gone.
        if self.communicator:
            communicator, self.communicator = self.communicator, 0
            self._call("ncclCommAbort", ctypes.c_void_p(communicator))

    def _call(self, name: str, *arguments: Any) -> None:
        status = getattr(self._library, name)(*arguments)
        if status:
            raise KernelError(f"{name} failed: {self._library.ncclGetErrorString(status).decode()}")


def _words(version: tuple[int, ...]) -> str:
    return ".".join(map(str, version))
