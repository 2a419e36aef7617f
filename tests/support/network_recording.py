"""A network that :mod:`.fakes.tensorrt` recorded, as files, and its calls played back on a TensorRT of another version.

The recording is of TensorRT 10's API: strongly typed, with INT64 shapes and addresses. What 8.6 lacks of it is mapped:
each layer is told its type, INT64 becomes INT32, and an address two of them. Nothing else differs.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np

from saw_trtllm.backends.tensorrt.versions import TensorRT

NETWORK, WEIGHTS = "network.json", "weights.npz"
#: NumPy's names of TensorRT's types.
DTYPES = {"FLOAT": "float32", "HALF": "float16", "INT32": "int32", "INT64": "int64", "BOOL": "bool"}
_POINTERS = "host_kv_cache_pool_pointers"
#: Attributes of a layer that are members of an enumeration, and the enumeration.
_ENUMS = {
    "ELEMENTWISE": {"op": "ElementWiseOperation"},
    "UNARY": {"op": "UnaryOperation"},
    "ACTIVATION": {"op": "ActivationType"},
    "REDUCE": {"op": "ReduceOperation"},
    "MATRIX_MULTIPLY": {"op0": "MatrixOperation", "op1": "MatrixOperation"},
    "GATHER": {"mode": "GatherMode"},
}
_ATTRIBUTES = {
    "CONSTANT": ("shape",),
    "CONCATENATION": ("axis",),
    "GATHER": ("axis", "num_elementwise_dims"),
    "REDUCE": ("axes", "keep_dims"),
    "SHUFFLE": ("first_transpose", "reshape_dims", "second_transpose", "zero_is_placeholder"),
    "SLICE": ("start", "shape", "stride"),
}


def save(network: Any, folder: Path) -> None:
    """Write a network that was built: its inputs, the calls that added its layers, its outputs and profiles."""
    place = {id(t): t.name for t in network._inputs}
    weights: dict[str, np.ndarray] = {}
    calls = []
    for number, layer in enumerate(network._layers):
        calls.append(_describe(layer, [None if t is None else place[id(t)] for t in layer._inputs]))
        place |= {id(layer.get_output(i)): [number, i] for i in range(layer.num_outputs)}
        if calls[-1]["type"] == "CONSTANT":
            weights[str(number)] = layer.weights.numpy()
    described = {
        "inputs": [[t.name, t.dtype.name, list(t.shape)] for t in network._inputs],
        "layers": calls,
        "outputs": [[t.name, t.dtype.name, place[id(t)]] for t in network._outputs],
        "profiles": [profile.shapes for profile in network.builder_config.profiles],
    }
    folder.mkdir(parents=True, exist_ok=True)
    (folder / NETWORK).write_text(json.dumps(described, indent=1), encoding="utf-8")
    np.savez(folder / WEIGHTS, **weights)


def _describe(layer: Any, inputs: list[Any]) -> dict[str, Any]:
    kind = layer.type.name
    types = [layer.get_output(i).dtype.name for i in range(layer.num_outputs)]
    call = {"type": kind, "name": layer.name, "inputs": inputs, "types": types}
    if kind.startswith("PLUGIN"):
        return call | {"plugin": layer.plugin.plugin_type, "fields": layer.plugin.fields}
    values = {name: getattr(layer, name) for name in _ATTRIBUTES.get(kind, ())}
    call |= {name: list(v) if isinstance(v, tuple) else v for name, v in values.items()}
    return call | {name: getattr(layer, name).name for name in _ENUMS.get(kind, {})}


class Replay:
    """Plays a recording back.

    Parameters
    ----------
    folder : Path
        Of :func:`save`.
    tensorrt : TensorRT
        With the plugins loaded.

    Attributes
    ----------
    network : tensorrt.INetworkDefinition
    """

    def __init__(self, folder: Path, tensorrt: TensorRT, builder: Any) -> None:
        self._tensorrt, self._trt = tensorrt, tensorrt.trt
        self._recorded = json.loads((folder / NETWORK).read_text(encoding="utf-8"))
        with np.load(folder / WEIGHTS) as weights:
            # TensorRT reads them when it builds the engine: they live as long as this does.
            self._weights = {int(name): self._narrow(weights[name]) for name in weights.files}
        self.network = tensorrt.create_network(builder)
        self._tensors: dict[Any, Any] = {}
        for name, dtype, shape in self._recorded["inputs"]:
            dtype, shape = self._input(name, DTYPES[dtype], tuple(shape))
            self._tensors[name] = self.network.add_input(name, tensorrt.dtype(dtype), shape)
        for number, call in enumerate(self._recorded["layers"]):
            layer = self._add(number, call)
            if layer is None:
                raise RuntimeError(f"TensorRT {tensorrt.version} does not take call {number}: {call}")
            layer.name = call["name"]
            self._pin(layer, call)
            self._tensors |= {(number, i): layer.get_output(i) for i in range(len(call["types"]))}
        for name, dtype, place in self._recorded["outputs"]:
            tensor = self._tensors[tuple(place)]
            tensor.name = name
            tensorrt.mark_output(self.network, tensor, DTYPES[dtype])

    def add_profiles(self, builder: Any, config: Any) -> None:
        """Give the inputs the recorded ranges."""
        for recorded in self._recorded["profiles"]:
            profile = builder.create_optimization_profile()
            for name, shapes in recorded.items():
                profile.set_shape(name, *(self._input(name, "", tuple(shape))[1] for shape in shapes))
            config.add_optimization_profile(profile)

    def _input(self, name: str, dtype: str, shape: tuple[int, ...]) -> tuple[str, tuple[int, ...]]:
        if name == _POINTERS:
            return self._tensorrt.pool_pointers(shape[0])
        return dtype, shape

    def _narrow(self, array: np.ndarray) -> np.ndarray:
        if array.dtype == np.int64 and not self._tensorrt.strongly_typed:
            return array.astype(np.int32)
        return array

    def _dtype(self, name: str) -> Any:
        dtype = DTYPES[name]
        return self._tensorrt.dtype("int32" if dtype == "int64" and not self._tensorrt.strongly_typed else dtype)

    def _pin(self, layer: Any, call: dict[str, Any]) -> None:
        """A cast and a plugin have types of their own; what is no float has no precision."""
        dtype = DTYPES[call["types"][0]]
        free = ("CAST", "PLUGIN_V2", "PLUGIN_V3")
        half_constant = call["type"] == "CONSTANT" and dtype == "float16"
        if dtype.startswith("float") and call["type"] not in free and not half_constant:
            self._tensorrt.pin(layer, dtype)

    def _add(self, number: int, call: dict[str, Any]) -> Any:
        network, kind = self.network, call["type"]
        x = [None if p is None else self._tensors[p if isinstance(p, str) else tuple(p)] for p in call["inputs"]]
        enums = {name: getattr(getattr(self._trt, enum), call[name]) for name, enum in _ENUMS.get(kind, {}).items()}
        if kind == "CONSTANT":
            return network.add_constant(tuple(call["shape"]), self._tensorrt.weights(self._weights[number]))
        if kind.startswith("PLUGIN"):
            return self._tensorrt.add_plugin(network, call["plugin"], call["fields"], x)
        if kind == "CONCATENATION":
            layer = network.add_concatenation(x)
            layer.axis = call["axis"]
            return layer
        if kind == "GATHER":
            layer = network.add_gather_v2(*x, enums["mode"])
            layer.axis, layer.num_elementwise_dims = call["axis"], call["num_elementwise_dims"]
            return layer
        if kind == "SHUFFLE":
            return self._shuffle(call, x)
        if kind == "SLICE":
            layer = network.add_slice(x[0], *(tuple(call[name]) for name in ("start", "shape", "stride")))
            for i, tensor in enumerate(x[1:], 1):
                if tensor is not None:
                    layer.set_input(i, tensor)
            return layer
        if kind == "MATRIX_MULTIPLY":
            return network.add_matrix_multiply(x[0], enums["op0"], x[1], enums["op1"])
        if kind == "REDUCE":
            return network.add_reduce(x[0], enums["op"], call["axes"], call["keep_dims"])
        if kind == "CAST":
            return network.add_cast(x[0], self._dtype(call["types"][0]))
        add = {"SHAPE": network.add_shape, "ELEMENTWISE": network.add_elementwise, "IDENTITY": network.add_identity}
        add |= {"UNARY": network.add_unary, "ACTIVATION": network.add_activation}
        return add[kind](*x, *enums.values())

    def _shuffle(self, call: dict[str, Any], x: list[Any]) -> Any:
        layer = self.network.add_shuffle(x[0])
        if call["first_transpose"] is not None:
            layer.first_transpose = tuple(call["first_transpose"])
        if call["reshape_dims"] is not None:
            layer.reshape_dims = tuple(call["reshape_dims"])
        if len(x) > 1:
            layer.set_input(1, x[1])
        if call["second_transpose"] is not None:
            layer.second_transpose = tuple(call["second_transpose"])
        layer.zero_is_placeholder = call["zero_is_placeholder"]
        return layer
