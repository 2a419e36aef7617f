"""Loads TensorRT-LLM's front-end, in Python, from its source and without its C++ half.

``SAW_TENSORRT_LLM_SOURCE`` names the folder that holds the package ``tensorrt_llm`` of a release with the engine
backend. What it imports of C++ and of other packages that only its other parts need is replaced by empty modules.
"""

from __future__ import annotations

import contextlib
import enum
import importlib
import importlib.machinery
import os
import sys
import types
import warnings
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from tests.support.fakes import tensorrt as fake_tensorrt

#: Modules that stand empty: whatever is asked of them is a class without content.
_EMPTY = (
    *("tensorrt_llm.bindings", "tensorrt_llm.bindings.BuildInfo", "tensorrt_llm.bindings.executor"),
    *("tensorrt_llm.bindings.internal", "tensorrt_llm.bindings.internal.runtime"),
    *("mpi4py", "mpi4py.MPI", "mpi4py.util", "mpi4py.util.pkl5", "nvtx", "onnx", "onnx_graphsurgeon"),
    *(
        "modelopt",
        "modelopt.torch",
        "modelopt.torch.export",
        "h5py",
        "strenum",
        "datasets",
        "tensorrt_llm._torch.utils",
        "cuda",
        "cuda.cuda",
        "cuda.cudart",
    ),
    *("tensorrt_llm.quantization.quantize_by_modelopt", "tensorrt_llm.quantization.utils", "tensorrt_llm.runtime"),
    "tensorrt_llm.models.gemma.convert",
)
#: Packages whose ``__init__`` would import the rest of TensorRT-LLM.
_BARE = ("tensorrt_llm", "tensorrt_llm._torch", "tensorrt_llm.llmapi", "tensorrt_llm.models")
_MODELS = {
    "GemmaForCausalLM": "gemma.model",
    "LLaMAForCausalLM": "llama.model",
    "QWenForCausalLM": "qwen.model",
    "PretrainedConfig": "modeling_utils",
    "PretrainedModel": "modeling_utils",
}


class _Member(str):
    def __int__(self):
        return 0

    def __or__(self, other):  # in annotations
        return self


class _Members(type):
    """Members of an empty class are their own names."""

    def __getattr__(cls, name):
        if name.startswith("__"):
            raise AttributeError(name)
        return _Member(f"{cls.__name__}.{name}")


class _Instance:
    """Takes any call, and does nothing."""

    def __init__(self, *args, **kwargs):
        pass

    def __getattr__(self, name):
        if name.startswith("__"):
            raise AttributeError(name)
        return lambda *args, **kwargs: None


class _StrEnum(str, enum.Enum):
    def __str__(self):
        return self.value

    @staticmethod
    def _generate_next_value_(name, start, count, last_values):
        return name


class _Empty(types.ModuleType):
    def __init__(self, name):
        super().__init__(name)
        self.__path__ = []
        self.__spec__ = importlib.machinery.ModuleSpec(name, None)

    def __getattr__(self, name):
        if name.startswith("__"):
            raise AttributeError(name)
        if f"{self.__name__}.{name}" in sys.modules:
            return sys.modules[f"{self.__name__}.{name}"]
        value = _Members(name, (_Instance,), {})
        setattr(self, name, value)
        return value


def source() -> Path | None:
    """The folder that the environment names, if it does."""
    folder = os.environ.get("SAW_TENSORRT_LLM_SOURCE")
    return Path(folder) if folder else None


def missing() -> str | None:
    """Why the front-end's source cannot be loaded here, if it cannot."""
    folder = source()
    if folder is None:
        return "SAW_TENSORRT_LLM_SOURCE does not name the source of a TensorRT-LLM with the engine backend"
    if not (folder / "tensorrt_llm" / "builder.py").is_file():
        return f"{folder} holds no tensorrt_llm/builder.py"
    return None


def forget() -> None:
    """Take TensorRT, TensorRT-LLM and what imports them out of Python."""
    for name in list(sys.modules):
        if name.split(".")[0] in ("tensorrt", "tensorrt_llm"):
            del sys.modules[name]
    for name in ("attention", "build", "model", "model_cls", "models", "rewrite"):
        sys.modules.pop(f"saw_trtllm.backends.tensorrt_llm.{name}", None)


@contextlib.contextmanager
def frontend() -> Iterator[types.SimpleNamespace]:
    """The front-end over :mod:`.tensorrt`, with ``tensorrt_llm``'s modules importable within the context."""
    package = source() / "tensorrt_llm"
    with pytest.MonkeyPatch.context() as patch, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        forget()
        trt = fake_tensorrt.install(patch)
        patch.setenv("TRT_LLM_NO_LIB_INIT", "1")
        hopper = types.SimpleNamespace(major=9, minor=0)
        patch.setattr(torch.cuda, "get_device_properties", lambda device=0: hopper)
        patch.setattr(torch.cuda, "device_count", lambda: 1)
        patch.setattr(torch.cuda, "set_device", lambda device: None)
        for name in _EMPTY:
            patch.setitem(sys.modules, name, _Empty(name))
        patch.setattr(sys.modules["strenum"], "StrEnum", _StrEnum, raising=False)
        for name in _BARE:
            module = types.ModuleType(name)
            module.__path__ = [str(package.joinpath(*name.split(".")[1:]))]
            patch.setitem(sys.modules, name, module)
        sys.modules["tensorrt_llm"].__version__ = "1.2.1"
        models = sys.modules["tensorrt_llm.models"]
        for name, module in _MODELS.items():
            setattr(models, name, getattr(importlib.import_module(f"tensorrt_llm.models.{module}"), name))
        models.MODEL_MAP = {
            "LlamaForCausalLM": models.LLaMAForCausalLM,
            "MistralForCausalLM": models.LLaMAForCausalLM,
            "Qwen2ForCausalLM": models.QWenForCausalLM,
            "Qwen3ForCausalLM": models.QWenForCausalLM,
            "Gemma2ForCausalLM": models.GemmaForCausalLM,
            "Gemma3ForCausalLM": models.GemmaForCausalLM,
        }
        builder = importlib.import_module("tensorrt_llm.builder")

        def trtllm_build(*args: object) -> None:
            """TensorRT-LLM's own command."""
            command = importlib.import_module("tensorrt_llm.commands.build")
            patch.setattr(command, "mpi_world_size", lambda: 1)
            patch.setattr(sys, "argv", ["trtllm-build", *map(str, args)])
            command.main()

        yield types.SimpleNamespace(trt=trt, builder=builder, models=models, trtllm_build=trtllm_build)
        forget()
