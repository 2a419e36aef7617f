"""What of the TensorRT plugins is checked without TensorRT's headers; test_plugin_adapters.py has the rest."""

from __future__ import annotations

import re
import sys
from types import SimpleNamespace

import pytest

from saw_trtllm.errors import BackendUnavailableError
from saw_trtllm.format import FORMAT_VERSION
from saw_trtllm.plugins import library
from tests.support.fakes import tensorrt as fake_tensorrt
from tests.support.fakes import tensorrt_86 as fake_tensorrt_86
from tests.support.plugin_library import NAMES, SOURCES, STEMS


def test_the_versions_are_one():
    header = (SOURCES / "adapter" / "names.h").read_text()
    assert re.search(r'kVersion\[\] = "(\w+)"', header)[1] == str(FORMAT_VERSION)


def test_the_version_of_the_kernels_symbols_is_that_of_their_library():
    header = (SOURCES.parent / "include" / "saw" / "common" / "library.h").read_text()
    version = re.search(r"kKernelsVersion = (\d+);", header)[1]
    assert f"SAW_KERNELS_{version} {{" in (SOURCES.parent / "src" / "exports.map").read_text()


def test_only_the_entry_points_are_exported():
    exports = (SOURCES / "adapter" / "exports.map").read_text()
    names = re.search(r"global:(.*?)local:\s*\*;", exports, re.S)[1].replace(";", " ").split()
    assert names == [
        "initSawTrtllmPlugins",
        "getCreators",
        "getPluginCreators",
        "setLoggerFinder",
    ]


@pytest.mark.parametrize("name", NAMES)
def test_the_readme_has_no_name_of_its_own(name):
    known = set(re.findall(r'\[\] = "(\w+)"', (SOURCES / "adapter" / "names.h").read_text()))
    listed = re.findall(r"^\| `(\w+)`", (SOURCES / f"{STEMS[name]}.md").read_text(), re.M)
    assert set(listed) <= known
    assert len(listed) > 4


@pytest.mark.parametrize(
    ("load_library", "folder", "name"),
    [
        (library.load_cublas_lt, "cu13/lib", "libcublasLt.so.13"),
        (library.load_cublas_lt, "cublas/lib", "libcublasLt.so.12"),
        (library.load_cublas_lt, "", "libcublasLt.so.12"),
        (library.load_cublas_lt, None, None),
        (library.load_nccl, "nccl/lib", "libnccl.so.2"),
        (library.load_nccl, "", "libnccl.so.2"),
        (library.load_nccl, None, None),
    ],
)
def test_nvidias_libraries_are_found_on_the_loaders_path_and_in_packages(
    load_library, folder, name, tmp_path, monkeypatch
):
    there = None if name is None else str(tmp_path / "nvidia" / folder / name) if folder else name
    opened = []

    def load(path):
        if path != there:
            raise OSError
        opened.append(path)
        return path

    if folder:
        (tmp_path / "nvidia" / folder).mkdir(parents=True)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr("ctypes.CDLL", load)
    assert bool(load_library()) == (there is not None)
    assert opened == [there] * (there is not None)


class Process:
    """A process that may load a plugin library and has TensorRT 8.6 or 10, which lists what was registered."""

    def __init__(self, monkeypatch, tmp_path, version):
        self.registered, self.tensorrts = [], [f"/usr/lib/libnvinfer.so.{version.split('.')[0]}"]
        self.registers, major = list(library.NAMES), int(version.split(".")[0])
        self.loaded, self.version = 0, version
        self.path = tmp_path / library.PLUGIN_LIBRARY.format(major)
        self.path.touch()
        registry = fake_tensorrt_86._Registry() if major < 10 else fake_tensorrt._Registry()
        listed = property(lambda _: [fake_tensorrt.IPluginCreator(name, "saw") for name in self.registered])
        kind = type("Registry", (type(registry),), {"plugin_creator_list": listed, "all_creators": listed})
        module = SimpleNamespace(__version__=version, get_plugin_registry=kind)
        monkeypatch.setitem(sys.modules, "tensorrt", module)
        monkeypatch.setattr(library.saw_trtllm, "__file__", str(tmp_path / "__init__.py"))
        monkeypatch.setattr("ctypes.CDLL", self.load)
        maps = lambda: [SimpleNamespace(path=path) for path in ["/usr/lib/libc.so.6", *self.tensorrts]]  # noqa: E731
        monkeypatch.setattr("psutil.Process", lambda: SimpleNamespace(memory_maps=maps))

    def load(self, path):
        assert path == str(self.path)
        self.loaded += 1

        def init(logger):
            self.registered.extend(self.registers or [])
            return self.registers is not None

        return SimpleNamespace(initSawTrtllmPlugins=init)


@pytest.fixture(params=["8.6.0", "10.6.0"])
def process(request, monkeypatch, tmp_path):
    return Process(monkeypatch, tmp_path, request.param)


def test_plugins_are_loaded_once_and_in_silence(process, capsys):
    library.load_plugins()
    library.load_plugins()
    assert process.loaded == 1
    assert library.find_creator(sys.modules["tensorrt"], library.GEMM).name == library.GEMM
    assert library.find_creator(sys.modules["tensorrt"], "SawNoSuchPlugin") is None
    assert capsys.readouterr() == ("", "")


def no_file(process):
    process.path.unlink()


def another_major(process):
    process.path = process.path.rename(process.path.with_name(library.PLUGIN_LIBRARY.format(11)))


def another_build(process):
    process.registers.remove(library.SILU_MUL)


def no_registry(process):
    process.registers = None


def two_tensorrts(process):
    process.registers = []
    process.tensorrts.append("/opt/libnvinfer.so.10.6.0")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (no_file, "{library} is missing: build it with SAW_TENSORRT_INCLUDE_DIR=DIR"),
        (
            another_major,
            "{folder} has libsaw_trtllm_plugins_trt11.so, and TensorRT {version} needs "
            "libsaw_trtllm_plugins_trt{major}.so: build it with that version's headers",
        ),
        (another_build, "{library} lacks the plugins SawSiluMul of version 1: build it anew"),
        (no_registry, "{library} could not register its plugins with TensorRT {version}, whose log says why"),
        (
            two_tensorrts,
            "this process has loaded 2 TensorRTs, /opt/libnvinfer.so.10.6.0 and /usr/lib/libnvinfer.so.{major}, and "
            "{library} has registered with another than that of Python, {version}: keep one of them on LD_LIBRARY_PATH",
        ),
    ],
)
def test_plugins_that_are_not_there_are_one_sentence(change, message, process, capsys):
    change(process)
    with pytest.raises(BackendUnavailableError) as raised:
        library.load_plugins()
    version = sys.modules["tensorrt"].__version__
    places = {
        "library": process.path,
        "folder": process.path.parent,
        "version": version,
        "major": version.split(".")[0],
    }
    assert str(raised.value).startswith(message.format(**places))
    assert capsys.readouterr() == ("", "")


@pytest.mark.parametrize("content", ["no library", None])
def test_a_library_that_cannot_be_loaded_is_one_sentence(content, process, monkeypatch):
    if content is None:  # of a time when it had no such function
        monkeypatch.setattr("ctypes.CDLL", lambda path: SimpleNamespace())
    else:
        monkeypatch.undo()
        monkeypatch.setattr(library.saw_trtllm, "__file__", str(process.path.with_name("__init__.py")))
        process.path.write_text(content)
    trt = SimpleNamespace(
        __version__=process.version,
        get_plugin_registry=lambda: SimpleNamespace(all_creators=[], plugin_creator_list=[]),
    )
    with pytest.raises(
        BackendUnavailableError, match=r"libsaw_trtllm_plugins_trt\d+.so cannot be loaded \(.*: build it anew"
    ):
        library.load_plugins(trt)
