# ruff: noqa: F403, F405
"""A stand-in for the module ``tensorrt`` 10.14 that records networks instead of building engines.

It has what defining and building a network calls, with TensorRT's names and signatures: layers that infer the shapes
and types of their outputs, also through shape tensors, and a plugin registry. ``build_serialized_network`` checks that
the network hangs together and gives a description of it. :func:`install` puts it in TensorRT's place.

The plugins of saw_trtllm are as strict here as docs/plugins.md says; those of other namespaces take anything.
"""

from __future__ import annotations

import json
import sys
import types
from collections import deque
from typing import Any, ClassVar

from tests.support.fakes.tensorrt_layers import *
from tests.support.fakes.tensorrt_plugins import *
from tests.support.fakes.tensorrt_types import *

__version__ = "10.14.1"


class INetworkDefinition:
    def __init__(self, flags=0):
        self.name, self.flags = "", flags
        self._layers, self._inputs, self._outputs = [], [], []
        self.weights_names, self.refittable = {}, {}

    def get_flag(self, flag):
        return (self.flags >> int(flag)) & 1 == 1

    num_layers = property(lambda self: len(self._layers))
    num_inputs = property(lambda self: len(self._inputs))
    num_outputs = property(lambda self: len(self._outputs))

    def get_layer(self, index):
        return self._layers[index]

    def get_input(self, index):
        return self._inputs[index]

    def get_output(self, index):
        return self._outputs[index]

    def add_input(self, name, dtype, shape):
        assert all(t.name != name for t in self._inputs), f"a second input {name}"
        self._inputs.append(ITensor(name, tuple(shape), dtype))
        return self._inputs[-1]

    def remove_tensor(self, tensor):
        assert not any(tensor is t for layer in self._layers for t in layer._inputs), f"{tensor.name} is in use"
        self._inputs = [t for t in self._inputs if t is not tensor]

    def mark_output(self, tensor):
        tensor.is_network_output = True
        self._outputs.append(tensor)

    def unmark_output(self, tensor):
        tensor.is_network_output = False
        self._outputs = [t for t in self._outputs if t is not tensor]

    def set_weights_name(self, weights, name):
        self.weights_names[name] = weights
        return True

    def mark_weights_refittable(self, name):
        if name in self.weights_names:
            self.refittable[name] = self.weights_names[name].numpy()
        return name in self.refittable

    def _add(self, layer):
        self._layers.append(layer)
        return layer

    def add_constant(self, shape, weights):
        return self._add(IConstantLayer(self, shape, weights))

    def add_shape(self, input):
        return self._add(IShapeLayer(self, [input]))

    def add_gather(self, input, indices, axis):
        layer = self._add(IGatherLayer(self, [input, indices]))
        layer.axis = axis
        return layer

    def add_gather_v2(self, input, indices, mode):
        layer = self._add(IGatherLayer(self, [input, indices]))
        layer.mode = mode
        return layer

    def add_concatenation(self, inputs):
        return self._add(IConcatenationLayer(self, inputs))

    def add_shuffle(self, input):
        return self._add(IShuffleLayer(self, [input]))

    def add_slice(self, input, start, shape, stride):
        return self._add(ISliceLayer(self, [input], start, shape, stride))

    def add_elementwise(self, input1, input2, op):
        return self._add(IElementWiseLayer(self, [input1, input2], op))

    def add_unary(self, input, op):
        return self._add(IUnaryLayer(self, [input], op))

    def add_activation(self, input, type):
        return self._add(IActivationLayer(self, [input], type))

    def add_identity(self, input):
        return self._add(IIdentityLayer(self, [input]))

    def add_cast(self, input, to_type):
        return self._add(ICastLayer(self, [input], to_type))

    def add_quantize(self, input, scale, output_type):
        return self._add(IQuantizeLayer(self, [input, scale], output_type))

    def add_dequantize(self, input, scale, output_type):
        return self._add(IDequantizeLayer(self, [input, scale], output_type))

    def add_reduce(self, input, op, axes, keep_dims):
        return self._add(IReduceLayer(self, [input], op, axes, keep_dims))

    def add_matrix_multiply(self, input0, op0, input1, op1):
        return self._add(IMatrixMultiplyLayer(self, [input0, input1], (op0, op1)))

    def add_plugin_v2(self, inputs, plugin):
        assert not isinstance(plugin, IPluginV3)
        return self._add(IPluginV2Layer(self, inputs, plugin))

    def add_plugin_v3(self, inputs, shape_inputs, plugin):
        assert isinstance(plugin, IPluginV3)
        assert shape_inputs == []
        return self._add(IPluginV3Layer(self, inputs, plugin))


def log_missing_creator(type, version):
    """Log as TensorRT does where a registry is asked for what it does not have."""
    text = f"[ERROR] TensorRT: IPluginRegistry::getCreator: Cannot find plugin: {type}, version: {version}"
    print(text, file=sys.stderr)


class _Registry:
    """TensorRT-LLM's plugins are there, this project's once they have been registered."""

    def __init__(self):
        self.saw = False

    def get_plugin_creator(self, type, version, plugin_namespace=""):
        return IPluginCreator(type, plugin_namespace) if plugin_namespace == "tensorrt_llm" else None

    @property
    def all_creators(self):
        return [IPluginCreatorV3One(name, "saw") for name in FIELDS] if self.saw else []

    def get_creator(self, type, version, plugin_namespace=""):
        if plugin_namespace == "tensorrt_llm":
            return self.get_plugin_creator(type, version, plugin_namespace)
        for creator in self.all_creators:
            if (creator.name, creator.plugin_version, creator.plugin_namespace) == (type, version, plugin_namespace):
                return creator
        log_missing_creator(type, version)
        return None


_registry = _Registry()


def get_plugin_registry():
    return _registry


class IOptimizationProfile:
    def __init__(self):
        self.shapes = {}

    def set_shape(self, input, min, opt, max):
        self.shapes[input] = (tuple(min), tuple(opt), tuple(max))

    set_shape_input = set_shape


class ITimingCache:
    def serialize(self):
        return memoryview(b"")


class IProgressMonitor:
    pass


class IBuilderConfig:
    def __init__(self):
        self.profiles, self.flags = [], set()
        self.profiling_verbosity = ProfilingVerbosity.LAYER_NAMES_ONLY

    num_optimization_profiles = property(lambda self: len(self.profiles))

    def set_flag(self, flag):
        self.flags.add(flag)

    def create_timing_cache(self, blob):
        return ITimingCache()

    def set_timing_cache(self, cache, ignore_mismatch):
        return True

    def get_timing_cache(self):
        return ITimingCache()

    def add_optimization_profile(self, profile):
        self.profiles.append(profile)
        return len(self.profiles) - 1


class IHostMemory(bytes):
    pass


class ICudaEngine:
    pass


class Builder:
    #: The networks that were defined last, for tests to walk.
    networks: ClassVar[deque] = deque(maxlen=4)

    def __init__(self, logger):
        pass

    def create_network(self, flags=0):
        Builder.networks.append(INetworkDefinition(flags))
        return Builder.networks[-1]

    def create_builder_config(self):
        return IBuilderConfig()

    def create_optimization_profile(self):
        return IOptimizationProfile()

    def build_serialized_network(self, network, config):
        network.builder_config = config
        inputs = {t.name: t for t in network._inputs}
        for profile in config.profiles:
            assert set(profile.shapes) == set(inputs), "inputs without a range, or ranges without an input"
            for name, (low, _, high) in profile.shapes.items():
                for size, a, b in zip(inputs[name].shape, low, high, strict=True):
                    assert (a == b == size) or size == -1, (name, inputs[name].shape, low, high)
        for layer in network._layers:
            for t in layer._inputs:
                assert t is None or t.producer is not None or t is inputs[t.name], (layer.name, t.name)
            for i in range(layer.num_outputs):
                assert layer.get_output(i).dtype is not None
        assert network._outputs
        described = {"inputs": sorted(inputs), "profiles": len(config.profiles)}
        if BuilderFlag.STRIP_PLAN in config.flags:
            assert BuilderFlag.REFIT_INDIVIDUAL in config.flags
            described["refittable"] = {name: [x.dtype.name, x.size] for name, x in network.refittable.items()}
        return IHostMemory(json.dumps(described).encode())


class _Unused:
    """Named by the front-end, used by nothing here."""


for _name in words(
    "DimsExprs IDimensionExpr IExprBuilder PluginTensorDesc Refitter Runtime DynamicPluginTensorDesc "
    "IPluginResource IPluginCapability"
):
    globals()[_name] = type(_name, (_Unused,), {})


def live_layers(network):
    """The layers that the outputs depend on, in the network's order: what is left when TensorRT has cleaned up."""
    alive, todo = set(), [t.producer for t in network._outputs]
    while todo:
        layer = todo.pop()
        if layer is None or id(layer) in alive:
            continue
        alive.add(id(layer))
        todo += [t.producer for t in layer._inputs if t is not None]
    return [layer for layer in network._layers if id(layer) in alive]


def plugin_layers(network, plugin_type):
    """The live layers of a plugin."""
    layers = live_layers(network)
    return [layer for layer in layers if isinstance(layer, PluginLayer) and layer.plugin.plugin_type == plugin_type]


def install(monkeypatch: Any) -> types.ModuleType:
    """Put this module in TensorRT's place until the test or fixture ends."""
    module = sys.modules[__name__]
    module.tensorrt = module  # as the package has its binding
    _registry.saw = False
    monkeypatch.setitem(sys.modules, "tensorrt", module)
    return module
