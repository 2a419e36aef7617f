"""The stand-in of :mod:`.tensorrt` with the differences of TensorRT 8.6, and a record of what is used of it."""

from __future__ import annotations

import enum
import sys
import types
from pathlib import Path
from typing import ClassVar

import saw_trtllm.backends.tensorrt
import saw_trtllm.plugins.library
from saw_trtllm.plugins.library import NAMES
from tests.support.fakes import tensorrt as fake

#: Whose calls are recorded.
_SOURCES = (str(Path(saw_trtllm.backends.tensorrt.__file__).parent), saw_trtllm.plugins.library.__file__)
#: What 8.6 does not have of the stand-in's names.
_LATER = {"int64", "bfloat16", "uint8", "int4", "fp4"}
_LATER |= {"TensorRTPhase", "IPluginV3", "IPluginCreatorV3One", "IProgressMonitor"}


class NetworkDefinitionCreationFlag(enum.IntEnum):
    EXPLICIT_BATCH = 0


class TacticSource(enum.IntEnum):
    CUBLAS, CUBLAS_LT, CUDNN, EDGE_MASK_CONVOLUTIONS, JIT_CONVOLUTIONS = range(5)


class BuilderFlag(enum.IntEnum):
    FP16, OBEY_PRECISION_CONSTRAINTS = 0, 10


class _PluginV2(fake.IPluginV2DynamicExt):
    """One of saw_trtllm's, that takes a pool's address as two INT32s."""

    def __init__(self, plugin):
        super().__init__(plugin.plugin_type, plugin.plugin_namespace, plugin.fields)
        self._plugin = plugin

    @property
    def num_outputs(self):
        return self._plugin.num_outputs

    def outputs(self, inputs):
        return self._plugin.outputs([self._as_int64(x) for x in inputs])

    @staticmethod
    def _as_int64(x):
        if x.name != "host_kv_cache_pool_pointers":
            return x
        assert (x.dtype, len(x.shape), x.shape[2]) == (fake.int32, 3, 2)
        return fake.ITensor(x.name, x.shape[:2], fake.int64)


class _Creator(fake.IPluginCreator):
    def create_plugin(self, name, field_collection):
        made = fake.IPluginCreatorV3One(self.name, "saw").create_plugin(
            name, field_collection, fake.TensorRTPhase.BUILD
        )
        return None if made is None else _PluginV2(made)


class _Registry:
    @property
    def plugin_creator_list(self):
        return [_Creator(name, "saw") for name in NAMES]

    def get_plugin_creator(self, type, version, plugin_namespace=""):
        fake.log_missing_creator(type, version)


class _ShapeLayer(fake.IShapeLayer):
    def infer(self, index):
        shape, _, value = super().infer(index)
        return shape, fake.int32, value


class _Network(fake.INetworkDefinition):
    """Layers may be told their types; an output is fp32 until it is told another."""

    add_plugin_v3 = property()

    def add_shape(self, input):
        return self._add(_ShapeLayer(self, [input]))

    def mark_output(self, tensor):
        super().mark_output(tensor)
        tensor.dtype = fake.float32

    def _add(self, layer):
        layer.set_output_type = types.MethodType(lambda layer, index, dtype: layer.types.update({index: dtype}), layer)
        layer.types = {}
        return super()._add(layer)


class _Config(fake.IBuilderConfig):
    tactic_sources = None

    def set_tactic_sources(self, sources):
        self.tactic_sources = sources


class _Builder(fake.Builder):
    def create_network(self, flags=0):
        assert flags == 1 << int(NetworkDefinitionCreationFlag.EXPLICIT_BATCH)
        fake.Builder.networks.append(_Network(flags))
        return fake.Builder.networks[-1]

    def create_builder_config(self):
        return _Config()


class Module:
    """The module; ``used`` has the names that saw_trtllm.backends.tensorrt used of it, as in ``DataType.HALF``."""

    __version__ = "8.6.0"
    _changed: ClassVar = {
        "NetworkDefinitionCreationFlag": NetworkDefinitionCreationFlag,
        "TacticSource": TacticSource,
        "BuilderFlag": BuilderFlag,
        "Builder": _Builder,
        "get_plugin_registry": lambda: _Registry(),
    }

    def __init__(self):
        self.used = set()

    def __getattr__(self, name):
        if name in _LATER:
            raise AttributeError(f"TensorRT 8.6 has no {name}")
        value = self._changed[name] if name in self._changed else getattr(fake, name)
        self.used.add(name)
        if isinstance(value, type) and issubclass(value, enum.Enum):
            return _Members(self, name, value)
        return value


class _Members:
    def __init__(self, module, name, values):
        self._module, self._name, self._values = module, name, values

    def __getattr__(self, member):
        self._module.used.add(f"{self._name}.{member}")
        return getattr(self._values, member)


def record_methods(monkeypatch, used):
    """Add to ``used`` what the definitions take of TensorRT's objects: ``INetworkDefinition.add_cast``."""
    classes = {
        "INetworkDefinition": _Network,
        "IBuilderConfig": _Config,
        "Builder": _Builder,
        "IOptimizationProfile": fake.IOptimizationProfile,
        "ITimingCache": fake.ITimingCache,
        "IPluginRegistry": _Registry,
        "IPluginCreator": _Creator,
        "ITensor": fake.ITensor,
        "IShuffleLayer": fake.IShuffleLayer,
        "ILayer": fake.ILayer,
    }
    for name, cls in classes.items():
        for access in ("__getattribute__", "__setattr__"):
            original = getattr(cls, access)

            def recording(self, attribute, *value, original=original, name=name):
                caller = sys._getframe(1).f_code.co_filename
                if caller.startswith(_SOURCES):
                    used.add(f"{name}.{attribute}")
                return original(self, attribute, *value)

            monkeypatch.setattr(cls, access, recording)
