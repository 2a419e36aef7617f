"""The plugin library, and plugins made by it, in any TensorRT that it is built for."""

from __future__ import annotations

import ctypes
import importlib.util
from collections.abc import Mapping
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import psutil

import saw_trtllm
from saw_trtllm.errors import BackendUnavailableError, ConfigError

WRITE = "SawRotateQuantizeKV"
ATTENTION = "SawInt4PagedAttention"
GEMM = "SawGemm"
QUANTIZED_GEMM = "SawQuantizedGemm"
LOOKUP = "SawLookup"
RMS_NORM = "SawRmsNorm"
SILU_MUL = "SawSiluMul"
ALL_REDUCE = "SawAllReduce"
ALL_GATHER = "SawAllGather"
NAMES = (WRITE, ATTENTION, GEMM, QUANTIZED_GEMM, LOOKUP, RMS_NORM, SILU_MUL, ALL_REDUCE, ALL_GATHER)
NAMESPACE = "saw"
#: Of the plugins: the cache format's.
VERSION = "1"

KERNELS_LIBRARY = "libsaw_kernels.so"
#: Of a TensorRT's major version.
PLUGIN_LIBRARY = "libsaw_trtllm_plugins_trt{}.so"
#: What Triton's C++ backend is started with; never the plugins themselves (docs/plugins.md).
PRELOAD_LIBRARY = "libsaw_trtllm_preload.so"

#: What SawGemm calls, and where in NVIDIA's Python packages it is, newest first.
_CUBLAS_LT = {"libcublasLt.so.13": "cu13/lib", "libcublasLt.so.12": "cublas/lib"}
#: What to do where there is none.
CUBLAS_LT = "pip install nvidia-cublas-cu12, or add the folder of libcublasLt.so.12 or .13 to LD_LIBRARY_PATH"
#: What the plugins between ranks call, and where it is.
_NCCL = {"libnccl.so.2": "nccl/lib"}
NCCL = "pip install nvidia-nccl-cu12 or nvidia-nccl-cu13, or add the folder of libnccl.so.2 to LD_LIBRARY_PATH"


def library_path(name: str) -> Path:
    """Where ``build_scripts/kernels`` and a wheel have one of the libraries: in the package.

    Raises
    ------
    BackendUnavailableError
        If it was not built.
    """
    path = Path(saw_trtllm.__file__).parent / name
    if not path.is_file():
        raise BackendUnavailableError(
            f"{path} is missing: build it with SAW_TENSORRT_INCLUDE_DIR=DIR build_scripts/kernels (docs/plugins.md)"
        )
    return path


def plugin_library(trt: ModuleType) -> Path:
    """The plugin library for a TensorRT: that of its major version.

    Parameters
    ----------
    trt : module
        ``tensorrt``, which has loaded the libnvinfer of its version.

    Raises
    ------
    BackendUnavailableError
        If there is none; the message names those that are there.
    """
    name = PLUGIN_LIBRARY.format(_major(trt))
    folder = Path(saw_trtllm.__file__).parent
    others = sorted(path.name for path in folder.glob(PLUGIN_LIBRARY.format("*")))
    if others and name not in others:
        raise BackendUnavailableError(
            f"{folder} has {', '.join(others)}, and TensorRT {trt.__version__} needs {name}: build it with that "
            "version's headers (docs/plugins.md)"
        )
    return library_path(name)


def load_plugins(trt: ModuleType | None = None) -> None:
    """Register the plugins with TensorRT, once for the process.

    Parameters
    ----------
    trt : module, optional
        ``tensorrt``.

    Raises
    ------
    BackendUnavailableError
        If there is no library for this TensorRT, or it does not load.
    """
    trt = trt or importlib.import_module("tensorrt")
    if not _missing(trt):
        return
    path = plugin_library(trt)
    try:
        init = ctypes.CDLL(str(path)).initSawTrtllmPlugins
    except (OSError, AttributeError) as e:
        raise BackendUnavailableError(f"{path} cannot be loaded ({e}): build it anew (docs/plugins.md)") from e
    init.restype, init.argtypes = ctypes.c_bool, [ctypes.c_void_p]
    if not init(None):
        raise BackendUnavailableError(
            f"{path} could not register its plugins with TensorRT {trt.__version__}, whose log says why"
        )
    if missing := _missing(trt):
        loaded = tensorrt_libraries()
        if len(loaded) > 1:
            raise BackendUnavailableError(
                f"this process has loaded {len(loaded)} TensorRTs, {' and '.join(loaded)}, and {path} has registered "
                f"with another than that of Python, {trt.__version__}: keep one of them on LD_LIBRARY_PATH"
            )
        raise BackendUnavailableError(
            f"{path} lacks the plugins {', '.join(missing)} of version {VERSION}: build it anew (docs/plugins.md)"
        )


def _missing(trt: ModuleType) -> list[str]:
    """Our plugins that TensorRT does not have."""
    found = _creators(trt)
    return [name for name in NAMES if name not in found]


def _creators(trt: ModuleType) -> dict[str, Any]:
    """Creators of our plugins by name."""
    # From the registry's list: TensorRT logs an error for each that it is asked for in vain.
    registry = trt.get_plugin_registry()
    creators = registry.all_creators if has_v3(trt) else registry.plugin_creator_list
    return {c.name: c for c in creators if (c.plugin_version, c.plugin_namespace) == (VERSION, NAMESPACE)}


def tensorrt_libraries() -> list[str]:
    """Files of TensorRT's library that this process has loaded."""
    files = {region.path for region in psutil.Process().memory_maps()}
    return sorted(file for file in files if Path(file).name.startswith("libnvinfer.so"))


def load_cublas_lt() -> bool:
    """Load cuBLASLt, from the loader's path or from a Python package, so that SawGemm finds it.

    Returns
    -------
    bool
        False if there is none.
    """
    return _load_first(_CUBLAS_LT) is not None


def load_nccl() -> ctypes.CDLL | None:
    """Load NCCL likewise, for SawAllReduce and SawAllGather; None if there is none."""
    return _load_first(_NCCL)


def _load_first(names: Mapping[str, str]) -> ctypes.CDLL | None:
    """The first library that loads, of those in the loader's path and in NVIDIA's Python packages."""
    packages = importlib.util.find_spec("nvidia")
    folders = [Path(p) for p in (packages and packages.submodule_search_locations) or ()]
    for name, place in names.items():
        for path in (name, *(str(folder / place / name) for folder in folders)):
            try:
                return ctypes.CDLL(path)
            except OSError:
                continue
    return None


def has_v3(trt: ModuleType) -> bool:
    """Whether plugins are V3, as from TensorRT 10 on, or V2."""
    return _major(trt) >= 10


def _major(trt: ModuleType) -> int:
    return int(trt.__version__.split(".")[0])


def find_creator(trt: ModuleType, name: str) -> Any:
    """The creator of one of our plugins, or None while the library is not loaded."""
    return _creators(trt).get(name)


def make_plugin(trt: ModuleType, name: str, fields: Mapping[str, int | float | str]) -> Any:
    """A plugin for a network that is being defined.

    Parameters
    ----------
    trt : module
    name : str
    fields : dict
        All that the plugin has; docs/plugins.md lists them.

    Raises
    ------
    BackendUnavailableError
        If the library was not loaded.
    ConfigError
        If the plugin rejects its fields; TensorRT's log says why.
    """
    creator = find_creator(trt, name)
    if creator is None:
        raise BackendUnavailableError(
            f"the plugin {name} is not registered with TensorRT {trt.__version__}: load its library (docs/plugins.md)"
        )
    # 8.6 keeps the addresses of the arrays only: they live until the plugin is made.
    arrays = {key: _field(value) for key, value in fields.items()}
    kinds = trt.PluginFieldType
    types = {np.dtype(np.int32): kinds.INT32, np.dtype(np.float32): kinds.FLOAT32, np.dtype(np.int8): kinds.CHAR}
    collection = trt.PluginFieldCollection(
        [trt.PluginField(key, array, types[array.dtype]) for key, array in arrays.items()]
    )
    phase = (trt.TensorRTPhase.BUILD,) if has_v3(trt) else ()
    plugin = creator.create_plugin(name, collection, *phase)
    if plugin is None:
        raise ConfigError(f"{name} rejects {dict(fields)}: see TensorRT's log for the reason")
    return plugin


def _field(value: int | float | str) -> np.ndarray:
    """An array of the field's type: text is CHAR, a number INT32 or FLOAT32."""
    if isinstance(value, str):
        return np.frombuffer(value.encode(), np.int8).copy()  # TensorRT wants a writable one
    return np.array([value], np.float32 if isinstance(value, float) else np.int32)
