"""Each way of a plugin library into TensorRT's registry, in a process of its own, with a stand-in for libnvinfer."""

from __future__ import annotations

import os
import subprocess
import sys
from functools import cache
from pathlib import Path
from types import SimpleNamespace

import pytest

from saw_trtllm.format import FORMAT_VERSION
from tests.support import plugin_library as lib

if lib.missing():
    pytest.skip(lib.missing(), allow_module_level=True)

#: What every process runs first: argv is the folder of TensorRT's stand-in, its name, the plugins.
BEGIN = """
import ctypes, sys
folder, nvinfer, library = sys.argv[1:]
def load_tensorrt():
    global tensorrt
    tensorrt = ctypes.CDLL(f"{folder}/{nvinfer}")
    tensorrt.fake_registered.restype = ctypes.c_char_p
def init():
    function = ctypes.CDLL(library).initSawTrtllmPlugins
    function.restype, function.argtypes = ctypes.c_bool, [ctypes.c_void_p]
    return function(None)
def registered():
    print(tensorrt.fake_registered().decode(), end="")
"""


@pytest.fixture(scope="session")
def build(tmp_path_factory):
    @cache
    def build_(include_dir: Path) -> SimpleNamespace:
        folder = tmp_path_factory.mktemp("libraries")
        plugins = lib.recording_library(include_dir)
        return SimpleNamespace(
            major=lib.tensorrt_major(include_dir),
            plugins=plugins,
            preload=lib.build_preload_library(plugins.parent),
            nvinfer=lib.build_fake_tensorrt(include_dir, folder),
        )

    return build_


@pytest.fixture(scope="module", params=lib.include_dirs(), ids=lambda folder: f"{lib.tensorrt_major(folder)}")
def built(request, build):
    return build(request.param)


@pytest.fixture
def everything(built):
    """What a registry lists when all creators are there."""
    versions = {8: [""], 10: ["", "-v2"], 11: [""]}[built.major]
    return [f"saw::{name} {FORMAT_VERSION}{v}" for v in versions for name in lib.NAMES]


def run(built, script: str, **environment: str) -> tuple[list[str], str]:
    """Lines of stdout, and stderr."""
    arguments = [str(built.nvinfer.parent), built.nvinfer.name, str(built.plugins)]
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("LD_", "SAW_"))}
    done = subprocess.run(
        [sys.executable, "-c", BEGIN + script, *arguments],
        env=kept | environment,
        capture_output=True,
        text=True,
        check=True,
        timeout=60,
    )
    return done.stdout.splitlines(), done.stderr


def test_a_call_registers_once(built, everything):
    out, _ = run(built, "load_tensorrt(); print(init(), init()); registered()")
    assert out == ["True True", *everything]


def test_a_call_finds_tensorrt_on_the_loaders_path(built, everything):
    out, _ = run(built, "print(init()); load_tensorrt(); registered()", LD_LIBRARY_PATH=str(built.nvinfer.parent))
    assert out == ["True", *everything]


def test_without_tensorrt_a_call_says_so(built):
    out, err = run(built, "print(init())")
    assert out == ["False"]
    assert f"TensorRT {built.major}, which these plugins were built for, is not there: load libnvinfer.so" in err


def test_a_registry_that_rejects(built):
    out, _ = run(built, "load_tensorrt(); tensorrt.fake_refuse(); print(init())")
    assert "False" in out
    assert any(f"logged: {lib.WRITE}: TensorRT's registry rejected version {FORMAT_VERSION}" in line for line in out)


def test_opening_registers_nothing_unless_asked_to(built, everything):
    script = "load_tensorrt(); ctypes.CDLL(library); registered()"
    assert run(built, script) == ([], "")
    assert run(built, script, SAW_TRTLLM_LOAD_PLUGINS="1")[0] == everything


def test_preloaded(built, everything):
    environment = {"LD_PRELOAD": str(built.preload), "LD_LIBRARY_PATH": str(built.nvinfer.parent)}
    assert run(built, "load_tensorrt(); registered()", **environment)[0] == everything
    out, _ = run(built, "load_tensorrt(); print(init()); registered()", **environment)
    assert out == ["True", *everything]


def test_preloaded_where_there_is_no_tensorrt(built):
    assert run(built, "print(1)", LD_PRELOAD=str(built.preload)) == (["1"], "")


def test_preloaded_alone(built, tmp_path):
    """Without the plugins beside it."""
    preload = tmp_path / built.preload.name
    preload.write_bytes(built.preload.read_bytes())
    out, err = run(built, "print(1)", LD_PRELOAD=str(preload), LD_LIBRARY_PATH=str(built.nvinfer.parent))
    assert out == ["1"]
    assert f"put the plugins of TensorRT {built.major} in the folder of the preloaded library" in err


def test_a_preloaded_library_hides_nobodys_symbols(built):
    listed = subprocess.run(
        ["nm", "--dynamic", "--defined-only", str(built.preload)], capture_output=True, text=True, check=True
    )
    # Weak ones are the C++ library's templates, alike everywhere.
    strong = [line.split()[-1] for line in listed.stdout.splitlines() if line.split()[-2] not in "WVu"]
    assert strong == []
