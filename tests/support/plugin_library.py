"""Compile and drive the TensorRT plugins from TensorRT's headers, without TensorRT.

``SAW_TENSORRT_INCLUDE_DIR`` names the headers' folder, or several, separated by colons: those of 8.6, 10 and 11.
"""

from __future__ import annotations

import importlib.util
import json
import os
import re
import shutil
import struct
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from ctypes import CDLL, c_char_p
from functools import cache
from pathlib import Path
from types import ModuleType
from typing import Any

from tests.support import ROOT

KERNELS = ROOT / "plugins" / "src"
SOURCES = ROOT / "plugins" / "tensorrt"
DRIVER = Path(__file__).parent / "plugin_driver"
FLAGS = ["-std=c++17", "-shared", "-Xcompiler=-fPIC,-fvisibility=hidden,-Wall,-Wextra,-Wno-deprecated-declarations"]
WRITE, ATTENTION = "SawRotateQuantizeKV", "SawInt4PagedAttention"
GEMM, QUANTIZED_GEMM = "SawGemm", "SawQuantizedGemm"
LOOKUP, RMS_NORM, SILU_MUL = "SawLookup", "SawRmsNorm", "SawSiluMul"
ALL_REDUCE, ALL_GATHER = "SawAllReduce", "SawAllGather"
NAMES = (WRITE, ATTENTION, GEMM, QUANTIZED_GEMM, LOOKUP, RMS_NORM, SILU_MUL, ALL_REDUCE, ALL_GATHER)
#: Of each plugin the stem of its files.
STEMS = {
    WRITE: "rotate_quantize_kv",
    ATTENTION: "paged_attention",
    GEMM: "gemm",
    QUANTIZED_GEMM: "quantized_gemm",
    LOOKUP: "lookup",
    RMS_NORM: "rms_norm",
    SILU_MUL: "silu_mul",
    ALL_REDUCE: "all_reduce",
    ALL_GATHER: "all_gather",
}
#: nvinfer1::DataType and nvinfer1::PluginFieldType.
FLOAT, HALF, INT32, BF16, INT64 = 0, 1, 3, 7, 8
FIELD_FLOAT32, FIELD_INT32, FIELD_CHAR = 1, 5, 6
LINEAR = 0

Field = tuple[str, int, bytes | None, int]


def include_dirs() -> list[Path]:
    return [Path(p) for p in os.environ.get("SAW_TENSORRT_INCLUDE_DIR", "").split(os.pathsep) if p]


def tensorrt_major(include_dir: Path) -> int:
    text = (include_dir / "NvInferVersion.h").read_text()
    return int(re.search(r"define (?:NV_TENSORRT_MAJOR|TRT_MAJOR_ENTERPRISE) (\d+)", text)[1])


def interfaces(include_dir: Path) -> list[str]:
    """The plugin interfaces that a TensorRT has and the library offers it."""
    major = tensorrt_major(include_dir)
    return ["V2"] * (major < 11) + ["V3"] * (major >= 10)


@cache
def nvcc() -> list[str]:
    """How to call nvcc: the one on PATH, or the one of the extra `kernels`; empty where there is none."""
    if shutil.which("nvcc"):
        return ["nvcc"]
    command = [sys.executable, str(ROOT / "plugins" / "pip_nvcc.py")]
    folder = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True).stdout.strip()
    return [f"{folder}/bin/nvcc", f"-L{folder}/lib"] if folder else []


def missing() -> str | None:
    """Why the plugins cannot be compiled here, if they cannot."""
    if not include_dirs():
        return "SAW_TENSORRT_INCLUDE_DIR does not name TensorRT's headers"
    if not nvcc():
        return "there is no nvcc: pip install 'saw-trtllm[kernels]'"
    if importlib.util.find_spec("pybind11") is None:
        return "pybind11 is not installed"
    return None


def compile_library(target: Path, sources: list[Path], flags: list[str]) -> Path:
    command = [*nvcc(), *FLAGS, *flags, "-o", str(target), *map(str, sources)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-4000:]
    assert "warning" not in done.stderr, done.stderr[-4000:]
    return target


def build_driver(include_dir: Path, folder: Path) -> ModuleType:
    import sysconfig

    import pybind11

    includes = [pybind11.get_include(), sysconfig.get_paths()["include"], str(include_dir)]
    flags = [part for folder_ in includes for part in ("-isystem", folder_)]
    name = f"saw_plugin_driver_{tensorrt_major(include_dir)}"
    flags.append(f"-DSAW_DRIVER_NAME={name}")
    path = compile_library(folder / f"{name}.so", [DRIVER / "driver.cpp"], flags)
    spec = importlib.util.spec_from_file_location(name, path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


_recording = tempfile.TemporaryDirectory(prefix="saw_plugins_")


@cache
def recording_library(include_dir: Path) -> Path:
    """The plugins over kernels that write down what they are called with, built once for all tests."""
    folder = Path(_recording.name) / str(tensorrt_major(include_dir))
    folder.mkdir()
    # One translation unit: TensorRT's headers take most of the time.
    unit = folder / "plugins.cpp"
    sources = [
        *sorted(SOURCES.glob("*.cpp")),
        *sorted(SOURCES.glob("adapter/*.cpp")),
        KERNELS / "library.cpp",
        DRIVER / "recorder.cpp",
    ]
    unit.write_text("".join(f'#include "{source}"\n' for source in sources))
    flags = [
        "-isystem",
        str(include_dir),
        f"-I{SOURCES}",
        f"-I{ROOT / 'plugins' / 'include'}",
        "-Xlinker=--no-undefined",
        '-DSAW_ARCHITECTURES=""',
    ]
    return compile_library(folder / f"libsaw_trtllm_plugins_trt{tensorrt_major(include_dir)}.so", [unit], flags)


def build_preload_library(folder: Path) -> Path:
    source = SOURCES / "adapter" / "preload" / "preload.cpp"
    return compile_library(folder / "libsaw_trtllm_preload.so", [source], [])


def build_fake_tensorrt(include_dir: Path, folder: Path) -> Path:
    """A libnvinfer with a registry and a logger, and nothing else."""
    name = f"libnvinfer.so.{tensorrt_major(include_dir)}"
    flags = ["-isystem", str(include_dir), f"-Xlinker=-soname={name}"]
    return compile_library(folder / name, [DRIVER / "fake_nvinfer.cpp"], flags)


def build_fake_cublas_lt(folder: Path) -> Path:
    name = "libcublasLt.so.13"
    return compile_library(folder / name, [DRIVER / "fake_cublaslt.cpp"], [f"-Xlinker=-soname={name}"])


def recorded_calls(library: Path, next_error: int = 0) -> list[dict[str, Any]]:
    """The kernels' calls since the last time; later ones return ``next_error``."""
    function = CDLL(str(library)).saw_recorded_calls
    function.restype = c_char_p
    return [json.loads(line) for line in function(next_error).decode().splitlines()]


def to_fields(values: Mapping[str, int | float | str]) -> list[Field]:
    fields: list[Field] = []
    for name, value in values.items():
        if isinstance(value, str):
            fields.append((name, FIELD_CHAR, value.encode(), len(value)))
        elif isinstance(value, float):
            fields.append((name, FIELD_FLOAT32, struct.pack("<f", value), 1))
        else:
            fields.append((name, FIELD_INT32, struct.pack("<i", value), 1))
    return fields


def creators(driver: ModuleType, library: Path) -> dict[tuple[str, str], Any]:
    """By (interface, plugin's name)."""
    found = {}
    for creator in driver.Library(str(library)).creators():
        interface, name, *_ = creator.identity()
        found[interface, name] = creator
    return found
