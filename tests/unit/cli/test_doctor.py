"""``saw-doctor`` on machines that lack one thing each."""

from __future__ import annotations

import json
import sys
from types import ModuleType

import pytest

from saw_trtllm.cli import doctor
from saw_trtllm.errors import BackendUnavailableError
from saw_trtllm.plugins.gpus import Driver, Gpu
from saw_trtllm.plugins.kernels import KernelsLibrary
from saw_trtllm.version import __version__

H200 = Gpu("NVIDIA H200", (9, 0), 140 << 30)


@pytest.fixture
def machine(monkeypatch):
    """A machine that has everything."""
    tensorrt = ModuleType("tensorrt")
    tensorrt.__version__ = "10.6.0"
    monkeypatch.setitem(sys.modules, "tensorrt", tensorrt)
    for name in ("cuda", "cuda.bindings", "cuda.bindings.runtime"):
        monkeypatch.setitem(sys.modules, name, ModuleType(name))
    kernels = KernelsLibrary("/lib/libsaw_kernels.so", 1, (12, 8), ["compute_80", "sm_80", "sm_90a"])
    monkeypatch.setattr(doctor.KernelsLibrary, "load", lambda: kernels)
    monkeypatch.setattr(doctor.Driver, "load", lambda: Driver((12, 9), [H200]))
    monkeypatch.setattr(doctor, "plugin_library", lambda trt: "/lib/libsaw_trtllm_plugins_trt10.so")
    monkeypatch.setattr(doctor, "load_plugins", lambda trt: None)
    monkeypatch.setattr(doctor, "tensorrt_libraries", lambda: ["/lib/libnvinfer.so.10"])
    return monkeypatch


def test_a_machine_that_has_everything(machine, capsys):
    assert doctor.main([]) == 0
    said = capsys.readouterr()
    assert said.err == ""
    lines = dict(line.split(maxsplit=1) for line in said.out.splitlines()[:-1])
    assert lines["package"] == __version__
    assert lines["gpus"] == "NVIDIA H200, 9.0, 140.0 GiB"
    assert lines["images"] == "compute_80, sm_80, sm_90a"
    assert (lines["tensorrt"], lines["plugins"]) == ("10.6.0", "/lib/libsaw_trtllm_plugins_trt10.so")
    assert doctor.main(["--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["missing"] is None
    assert found["gpus"] == [{"name": "NVIDIA H200", "compute_capability": "9.0", "memory": 140 << 30}]


def missing(sentence):
    def load(*_):
        raise BackendUnavailableError(sentence)

    return load


LACKING = {
    "kernels": (("KernelsLibrary.load", missing("kernels: build")), "kernels: build"),
    "driver": (("Driver.load", missing("driver: install")), "driver: install"),
    "gpu": (("Driver.load", lambda: Driver((12, 9), [])), "shows no GPU: check CUDA_VISIBLE_DEVICES"),
    "newer driver": (
        ("Driver.load", lambda: Driver((11, 8), [H200])),
        "the NVIDIA driver runs CUDA 11.8 and the kernels are of CUDA 12.8: install a driver of CUDA 12, or",
    ),
    "image": (
        ("Driver.load", lambda: Driver((12, 9), [H200, Gpu("Tesla T4", (7, 5), 16 << 30)])),
        "Tesla T4 has compute capability 7.5 and the kernels have images for compute_80, sm_80, sm_90a: build them",
    ),
    "plugins": (("plugin_library", missing("plugins: build")), "plugins: build"),
    "registry": (("load_plugins", missing("plugins: another TensorRT")), "plugins: another TensorRT"),
}


@pytest.mark.parametrize(("change", "sentence"), LACKING.values(), ids=LACKING.keys())
def test_what_is_missing_is_one_sentence(change, sentence, machine, capsys):
    place, value = change
    owner, _, attribute = place.rpartition(".")
    machine.setattr(getattr(doctor, owner) if owner else doctor, attribute, value)
    assert doctor.main([]) == 2
    said = capsys.readouterr()
    (line,) = said.err.splitlines()
    assert line.startswith("error: ")
    assert sentence in line
    assert doctor.main(["--json"]) == 2
    said = capsys.readouterr()
    assert sentence in json.loads(said.out)["missing"]
    assert said.err == ""


@pytest.mark.parametrize("name", ["tensorrt", "cuda.bindings.runtime"])
def test_a_package_that_is_missing_is_one_sentence(name, machine, capsys):
    machine.setitem(sys.modules, name, None)
    assert doctor.main([]) == 2
    assert f"error: {name} cannot be imported" in capsys.readouterr().err
