"""compressed-tensors, as llm-compressor writes it: packed integers, and FP8 by tensor, channel or block."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, Literal

import numpy as np
from pydantic import Field, field_validator

from saw_trtllm.checkpoint.families.family import OFF, KeyRule
from saw_trtllm.checkpoint.quantization.dialect import (
    FLOATS,
    Block,
    Dialect,
    Linear,
    Settings,
    StoredWeight,
    check_keys,
    parse,
    words,
)
from saw_trtllm.checkpoint.quantization.scaled import stored_fp8
from saw_trtllm.errors import CheckpointError
from saw_trtllm.model.quantization import Activation, QuantizedWeight, WeightFormat

_INT_FORMATS, _FP8_FORMATS = ("pack-quantized",), ("float-quantized", "naive-quantized")


class Arguments(Settings):
    """Of weights, or of a layer's input."""

    num_bits: int = 8
    type: Literal["int", "float"] = "int"
    symmetric: bool = True
    group_size: int | None = None
    strategy: Literal["tensor", "channel", "group", "block", "token"] | None = None
    block_structure: Block | None = None
    dynamic: bool = False
    actorder: Literal["group", "dynamic", "weight", "static"] | bool | None = None


class Group(Settings):
    """Layers that are quantized alike."""

    targets: list[str]
    weights: Arguments | None = None
    input_activations: Arguments | None = None
    format: str | None = None

    @field_validator("targets")
    @classmethod
    def _check_patterns(cls, targets: list[str]) -> list[str]:
        for target in targets:
            if target.startswith("re:"):
                try:
                    re.compile(target[3:])
                except re.error as e:
                    raise ValueError(f"{target!r} is no pattern ({e}): use the weights' own config") from e
        return targets


class CompressedTensorsSettings(Settings):
    """What is read of them."""

    config_groups: dict[str, Group]
    format: str = "pack-quantized"
    ignore: list[str] | None = Field(default_factory=list)


ARGUMENT_KEYS = (
    KeyRule("honored", "4 and 8", ("num_bits",)),
    KeyRule("honored", "`int` packed, `float` as e4m3", ("type",)),
    KeyRule("honored", "`tensor`, `channel`, `group`, `block`", ("strategy", "group_size", "block_structure")),
    KeyRule("honored", "whether weights have zero points", ("symmetric",)),
    KeyRule("honored", "whether a scale of the layer's input is stored", ("dynamic",)),
    KeyRule("honored", "the order of columns of `group`; TensorRT's engines do not take it", ("actorder",)),
    KeyRule("harmless", "tensors say what they are stored in", ("scale_dtype", "zp_dtype")),
    KeyRule("harmless", "how it was quantized", ("observer", "observer_kwargs")),
)
GROUP_KEYS = (
    KeyRule("honored", "names, `re:` patterns, or `Linear`", ("targets",)),
    KeyRule("honored", "see below", ("weights", "input_activations")),
    KeyRule("honored", "in place of the model's", ("format",)),
    KeyRule("rejected", "quantized outputs", ("output_activations",), OFF),
)


def reader(settings: dict[str, Any], path: Path) -> Callable[[Linear], StoredWeight | None]:
    """See :class:`Dialect`."""
    given = parse(CompressedTensorsSettings, settings, path, "compressed-tensors")
    for raw in settings["config_groups"].values():
        check_keys(raw, GROUP_KEYS, path, "compressed-tensors")
        for key in ("weights", "input_activations"):
            check_keys(raw.get(key) or {}, ARGUMENT_KEYS, path, "compressed-tensors")

    def read(linear: Linear) -> StoredWeight | None:
        if linear.find("weight_scale") is None:
            return None
        group = _group_of(linear.name, given.config_groups.values())
        if group is None or group.weights is None:
            raise CheckpointError(
                f"{path} has no group of weights for {linear.name!r}, which is stored with scales: use the config that "
                "belongs to these weights"
            )
        stored = group.format or given.format
        if group.weights.type == "int" and stored in _INT_FORMATS and group.input_activations is None:
            return _packed(linear, group.weights, path)
        if group.weights.type == "float" and stored in _FP8_FORMATS and group.weights.num_bits == 8:
            return _fp8(linear, group, path)
        inputs = group.input_activations
        raise CheckpointError(
            f"{path} has {group.weights.type} weights of {group.weights.num_bits} bits"
            + ("" if inputs is None else f" and {inputs.type} activations of {inputs.num_bits}")
            + f", stored as {stored!r}, but integers as 'pack-quantized' with 16-bit activations and FP8 as "
            "'float-quantized' are supported: use such a model"
        )

    return read


def _group_of(name: str, groups: Iterable[Group]) -> Group | None:
    """The group that names a linear layer most closely, as the library takes it.

    A name comes before the patterns, which match from its beginning, and these before the class; of several patterns
    the first in the alphabet.
    """

    def rank(target: str) -> int | None:
        if target.startswith("re:"):
            return 1 if re.match(target[3:], name) else None
        return {name: 0, "Linear": 2}.get(target)

    found = [(place, t, g) for g in groups for t in g.targets if (place := rank(t)) is not None]
    return min(found, key=lambda match: match[:2])[2] if found else None


def _packed(linear: Linear, weights: Arguments, path: Path) -> StoredWeight:
    bits = weights.num_bits
    if bits not in (4, 8):
        raise CheckpointError(f"{path} has integer weights of {bits} bits, but 4 and 8 are supported: use such a model")
    (out, inputs), each = linear.shape, 32 // bits
    grouped = weights.strategy == "group" or (weights.strategy is None and weights.group_size is not None)
    columns = linear.check_groups((weights.group_size or -1) if grouped else -1)
    groups = inputs // columns
    packed = linear.take("weight_packed", ("I32",), (out, -(-inputs // each)))
    by_tensor = () if grouped else ((1,), ())
    scales = linear.take("weight_scale", FLOATS, (out, groups), *by_tensor)
    shape = linear.take("weight_shape", ("I64", "I32"), (2,))
    tensors = [packed, scales, shape]
    points, order = None, None
    if not weights.symmetric:
        points = linear.take("weight_zero_point", ("I32",), (-(-out // each), groups))
        tensors.append(points)
    act_order = weights.actorder in ("group", "dynamic", True)
    if act_order:
        order = linear.take("weight_g_idx", ("I32",), (inputs,))
        tensors.append(order)
    kind = WeightFormat(
        kind="int4" if bits == 4 else "int8",
        block=(1, columns),
        zeros=points is not None,
        act_order=act_order,
        scale_dtype=scales.dtype,
    )

    def unpack() -> QuantizedWeight:
        if tuple(shape.load()) != linear.shape:
            raise CheckpointError(
                f"{shape.path}: tensor {shape.name!r} says {shape.load().tolist()}, but {list(linear.shape)} is what "
                "config.json asks for: use the config.json that belongs to these weights"
            )
        values = np.ascontiguousarray(words(packed, bits, 1)[:, :inputs])
        grid = np.broadcast_to(scales.load().reshape(-1, groups), (out, groups))
        zeros = None if points is None else words(points, bits, 0)[:out]
        index = None if order is None else order.load().astype(np.int32)
        if index is not None and not ((index >= 0) & (index < groups)).all():
            raise CheckpointError(
                f"{linear.folder}: the weight of {linear.name!r} names groups that are not there: download it again"
            )
        return QuantizedWeight(kind, values, np.ascontiguousarray(grid), zeros, index)

    return StoredWeight(linear.name, linear.shape, kind, tuple(tensors), unpack)


def _fp8(linear: Linear, group: Group, path: Path) -> StoredWeight:
    weights, inputs = group.weights or Arguments(), group.input_activations
    if not weights.symmetric or weights.strategy == "group":
        raise CheckpointError(
            f"{path} has FP8 weights in groups or with zero points, but scales by tensor, channel or block are "
            "supported: use such a model"
        )
    block = weights.block_structure if weights.strategy == "block" else None
    if weights.strategy == "block" and block is None:
        raise CheckpointError(f"{path} has weights in blocks without a block_structure: use the model's own config")
    static = inputs is not None and not inputs.dynamic
    activation: Activation | None = None if inputs is None else "tensor" if static else "block" if block else "token"
    return stored_fp8(
        linear,
        "weight_scale",
        None if block is None else (block[0], block[1]),
        activation,
        input_scale="input_scale" if static else None,
    )


COMPRESSED_TENSORS = Dialect(
    name="compressed-tensors",
    library="llm-compressor",
    file=None,
    keys=(
        KeyRule("honored", "the dialect", ("quant_method",)),
        KeyRule("honored", "by the group that names a layer most closely", ("config_groups",)),
        KeyRule("honored", "`pack-quantized`, `float-quantized`, `naive-quantized`", ("format",)),
        KeyRule("honored", "a layer is quantized if its tensors are", ("ignore",)),
        KeyRule("rejected", "sparse weights", ("sparsity_config", "moe_sparsity_config"), (None, {})),
        KeyRule("rejected", "rotations at run time", ("transform_config",), (None, {})),
        KeyRule("harmless", "the cache has scales of its own", ("kv_cache_scheme",)),
        KeyRule("harmless", "where it comes from", ("quantization_status", "global_compression_ratio", "version")),
        KeyRule(
            "harmless",
            "what transformers does when it loads them",
            ("run_compressed", "dequantize", "use_optimized_inference"),
        ),
    ),
    reader=reader,
    sections={"a group": GROUP_KEYS, "weights and input_activations": ARGUMENT_KEYS},
)
