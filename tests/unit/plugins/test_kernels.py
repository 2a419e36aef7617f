"""The GPUs that images of the kernels serve, by NVIDIA's rules of compatibility."""

from __future__ import annotations

from types import SimpleNamespace

import pytest

from saw_trtllm.errors import BackendUnavailableError
from saw_trtllm.plugins import gpus
from saw_trtllm.plugins.kernels import KernelsLibrary, images_of


@pytest.mark.parametrize(
    ("architectures", "images"),
    [
        ("90a", ["compute_90a", "sm_90a"]),
        ("80,90a-real,100-real", ["compute_80", "sm_100", "sm_80", "sm_90a"]),
        ("80-virtual", ["compute_80"]),
    ],
)
def test_images_of_cmakes_architectures(architectures, images):
    assert images_of(architectures) == images


@pytest.mark.parametrize(
    ("architectures", "serves", "serves_not"),
    [
        ("80-real", ["8.0", "8.6", "8.9"], ["7.5", "9.0", "10.0"]),
        ("86-real", ["8.6", "8.9"], ["8.0"]),
        ("80-virtual", ["8.0", "9.0", "12.0"], ["7.5"]),
        ("90a", ["9.0"], ["8.9", "10.0", "12.0"]),
        ("80,90a-real,100-real", ["8.0", "9.0", "10.0", "10.3", "12.0"], ["7.5"]),
        ("100-real", ["10.0", "10.3"], ["9.0", "11.0", "12.0"]),
    ],
)
def test_gpus_that_images_serve(architectures, serves, serves_not):
    library = KernelsLibrary("", 1, (13, 0), images_of(architectures))
    capabilities = [tuple(map(int, text.split("."))) for text in serves + serves_not]
    assert [library.runs_on(c) for c in capabilities] == [True] * len(serves) + [False] * len(serves_not)


class FakeDriver:
    """libcuda of a machine with one H200, or with none."""

    def __init__(self, count: int = 1, started: int = 0) -> None:
        self.cuInit = lambda flags: started
        self.cuDeviceGetCount = lambda number: self._set(number, count)
        self.cuDriverGetVersion = lambda number: self._set(number, 12040)
        self.cuDeviceTotalMem_v2 = lambda size, ordinal: self._set(size, 140 << 30)

    @staticmethod
    def _set(reference, value: int) -> int:
        reference._obj.value = value
        return 0

    def cuDeviceGetName(self, name, size, ordinal) -> int:  # noqa: N802
        name.value = b"NVIDIA H200"
        return 0

    def cuDeviceGetAttribute(self, number, attribute, ordinal) -> int:  # noqa: N802
        return self._set(number, {75: 9, 76: 0}[attribute])


def test_the_driver_names_its_gpus(monkeypatch):
    monkeypatch.setattr(gpus.ctypes, "CDLL", lambda name: FakeDriver())
    assert gpus.Driver.load() == gpus.Driver((12, 4), [gpus.Gpu("NVIDIA H200", (9, 0), 140 << 30)])


def test_a_driver_without_a_gpu_is_a_driver(monkeypatch):
    monkeypatch.setattr(gpus.ctypes, "CDLL", lambda name: FakeDriver(started=100))
    assert gpus.Driver.load() == gpus.Driver((12, 4), [])


def test_a_driver_that_does_not_start_is_one_sentence(monkeypatch):
    monkeypatch.setattr(gpus.ctypes, "CDLL", lambda name: FakeDriver(started=999))
    with pytest.raises(BackendUnavailableError, match="answers with error 999 of CUDA: see what nvidia-smi says"):
        gpus.Driver.load()


def test_a_kernels_library_of_another_time_is_one_sentence(monkeypatch, tmp_path):
    monkeypatch.setattr("saw_trtllm.plugins.kernels.library_path", lambda name: tmp_path / name)
    monkeypatch.setattr("saw_trtllm.plugins.kernels.ctypes.CDLL", lambda path: SimpleNamespace())
    with pytest.raises(BackendUnavailableError, match=r"libsaw_kernels.so cannot be loaded \(.*: build it anew"):
        KernelsLibrary.load()
