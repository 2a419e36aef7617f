"""The GPUs and the driver of this machine, asked of the driver itself: nothing but it need be installed."""

from __future__ import annotations

import ctypes
from dataclasses import dataclass

from saw_trtllm.errors import BackendUnavailableError

_DRIVER = "libcuda.so.1"
_CAPABILITY_MAJOR, _CAPABILITY_MINOR = 75, 76  # of CUdevice_attribute
_NO_DEVICE = 100


@dataclass(frozen=True)
class Gpu:
    """A GPU.

    Attributes
    ----------
    name : str
    capability : tuple of int
        Its compute capability.
    memory : int
        Bytes.
    """

    name: str
    capability: tuple[int, int]
    memory: int


@dataclass(frozen=True)
class Driver:
    """NVIDIA's driver: the newest CUDA that it runs, as major and minor version, and the GPUs that it lets us see."""

    cuda: tuple[int, int]
    gpus: list[Gpu]

    @classmethod
    def load(cls) -> Driver:
        """Ask the driver; no context is made on any GPU.

        Raises
        ------
        BackendUnavailableError
            If there is no driver, or it does not answer.
        """
        try:
            driver = ctypes.CDLL(_DRIVER)
        except OSError as e:
            raise BackendUnavailableError(
                f"there is no NVIDIA driver ({e}): install it, or start the container with its GPUs; an engine of "
                "saw-build --backend reference runs on any CPU"
            ) from e
        version, count = ctypes.c_int(), ctypes.c_int()
        started = driver.cuInit(0)
        for code in (0 if started == _NO_DEVICE else started, driver.cuDriverGetVersion(ctypes.byref(version))):
            _check(code)
        if started != _NO_DEVICE:
            _check(driver.cuDeviceGetCount(ctypes.byref(count)))
        cuda = (version.value // 1000, version.value % 1000 // 10)
        return cls(cuda, [_gpu(driver, ordinal) for ordinal in range(count.value)])


def _gpu(driver: ctypes.CDLL, ordinal: int) -> Gpu:
    name, memory, numbers = ctypes.create_string_buffer(256), ctypes.c_size_t(), (ctypes.c_int(), ctypes.c_int())
    _check(driver.cuDeviceGetName(name, len(name), ordinal))
    _check(driver.cuDeviceTotalMem_v2(ctypes.byref(memory), ordinal))
    for number, attribute in zip(numbers, (_CAPABILITY_MAJOR, _CAPABILITY_MINOR), strict=True):
        _check(driver.cuDeviceGetAttribute(ctypes.byref(number), attribute, ordinal))
    return Gpu(name.value.decode(), (numbers[0].value, numbers[1].value), memory.value)


def _check(code: int) -> None:
    if code:
        raise BackendUnavailableError(
            f"the NVIDIA driver answers with error {code} of CUDA: see what nvidia-smi says, and install the driver "
            "anew"
        )
