"""The plugin library, and its plugins as layers of a TensorRT-LLM network."""

from __future__ import annotations

import ctypes
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

import saw_trtllm
from saw_trtllm.errors import BackendUnavailableError, ConfigError

if TYPE_CHECKING:
    from tensorrt_llm.functional import Tensor

WRITE = "SawRotateQuantizeKV"
ATTENTION = "SawInt4PagedAttention"
NAMESPACE = "saw"
#: Of the plugins: the cache format's.
VERSION = "1"

LIBRARY = "libsaw_trtllm_plugins.so"
#: What Triton's C++ backend is started with; never the library itself (docs/plugins.md).
PRELOAD_LIBRARY = "libsaw_trtllm_preload.so"


def library_path(name: str = LIBRARY) -> Path:
    """Where ``build_scripts/kernels`` leaves the library: in the package.

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


def load_plugins() -> None:
    """Register the plugins with TensorRT, once for the process.

    Raises
    ------
    BackendUnavailableError
        If the library is missing or does not fit this TensorRT.
    """
    import tensorrt as trt

    if trt.get_plugin_registry().get_creator(WRITE, VERSION, NAMESPACE) is not None:
        return
    path = library_path()
    try:
        init = ctypes.CDLL(str(path)).initSawTrtllmPlugins
    except OSError as e:
        raise BackendUnavailableError(f"{path} cannot be loaded ({e}): build it anew (docs/plugins.md)") from e
    init.restype, init.argtypes = ctypes.c_bool, [ctypes.c_void_p]
    if not init(None):
        raise BackendUnavailableError(
            f"{path} does not register with TensorRT {trt.__version__}: build it with that version's headers"
        )


def add_plugin(name: str, fields: Mapping[str, int | float | str], inputs: Sequence[Tensor]) -> list[Tensor]:
    """Add a layer to the network that is being defined.

    Parameters
    ----------
    name : str
    fields : dict
        All of the plugin's fields; docs/plugins.md has them.
    inputs : sequence of Tensor

    Raises
    ------
    ConfigError
        If the plugin refuses its fields; TensorRT's log says why.
    """
    import tensorrt as trt
    from tensorrt_llm._common import default_trtnet
    from tensorrt_llm.functional import _create_tensor

    load_plugins()
    creator = trt.get_plugin_registry().get_creator(name, VERSION, NAMESPACE)
    # The arrays live until the plugin is made: older TensorRTs keep their addresses only.
    arrays = {key: _field(value) for key, value in fields.items()}
    kinds = {np.int32: trt.PluginFieldType.INT32, np.float32: trt.PluginFieldType.FLOAT32}
    plugin_fields = [
        trt.PluginField(key, array, kinds.get(array.dtype.type, trt.PluginFieldType.CHAR))
        for key, array in arrays.items()
    ]
    collection = trt.PluginFieldCollection(plugin_fields)
    plugin = creator.create_plugin(name, collection, trt.TensorRTPhase.BUILD)
    if plugin is None:
        raise ConfigError(f"{name} refuses {dict(fields)}: see TensorRT's log for the reason")
    layer = default_trtnet().add_plugin_v3([t.trt_tensor for t in inputs], [], plugin)
    return [_create_tensor(layer.get_output(i), layer) for i in range(layer.num_outputs)]


def _field(value: int | float | str) -> np.ndarray:
    if isinstance(value, str):
        return np.frombuffer(value.encode(), np.int8).copy()  # TensorRT wants a writable one
    return np.array([value], np.float32 if isinstance(value, float) else np.int32)
