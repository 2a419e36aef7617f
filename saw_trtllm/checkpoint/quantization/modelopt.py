"""NVIDIA's Model Optimizer: ``hf_quant_config.json`` beside a Hugging Face model."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from saw_trtllm.checkpoint.families.family import OFF, KeyRule
from saw_trtllm.checkpoint.quantization.dialect import (
    FLOATS,
    Dialect,
    Linear,
    Settings,
    StoredWeight,
    check_keys,
    parse,
)
from saw_trtllm.checkpoint.quantization.scaled import stored_fp8
from saw_trtllm.errors import CheckpointError
from saw_trtllm.model.quantization import QuantizedWeight, WeightFormat

ALGORITHMS = ("FP8", "FP8_PER_CHANNEL_PER_TOKEN", "FP8_PB_WO", "W4A16_AWQ")


class LayerSettings(Settings):
    """Of a layer in a model of several algorithms."""

    quant_algo: str
    group_size: int | None = None


class ModelOptSettings(Settings):
    """What is read of them."""

    quant_algo: str | None = None
    group_size: int | None = None
    quantized_layers: dict[str, LayerSettings] | None = None


SECTION_KEYS = (
    KeyRule("honored", "`" + "`, `".join(ALGORITHMS) + "`, `MIXED_PRECISION` of them", ("quant_algo",)),
    KeyRule("honored", "what divides a layer's inputs", ("group_size",)),
    KeyRule("honored", "of MIXED_PRECISION", ("quantized_layers",)),
    KeyRule("honored", "a layer is quantized if its tensors are", ("exclude_modules",)),
    KeyRule("honored", "factors are read where they are stored", ("pre_quant_scale",)),
    KeyRule("rejected", "zero points of integers with sign", ("has_zero_point",), OFF),
    KeyRule("harmless", "the cache has scales of its own", ("kv_cache_quant_algo",)),
)


def reader(settings: dict[str, Any], path: Path) -> Callable[[Linear], StoredWeight | None]:
    """See :class:`Dialect`; as a ``quantization_config`` the same stands without its section."""
    section = settings.get("quantization", settings)
    if not isinstance(section, dict):
        raise CheckpointError(f"{path} has a quantization that is no JSON object: download it again")
    if "quantization" in settings:
        check_keys(section, SECTION_KEYS, path, "modelopt")
    given = parse(ModelOptSettings, section, path, "modelopt")

    def read(linear: Linear) -> StoredWeight | None:
        weight = linear.find("weight")
        if weight is None or weight.dtype not in ("F8_E4M3", "U8", "I8"):
            return None
        layer = (given.quantized_layers or {}).get(linear.name)
        algorithm = given.quant_algo if layer is None else layer.quant_algo
        if algorithm not in ALGORITHMS:
            raise CheckpointError(
                f"{path} names the quantization {algorithm} for {linear.name!r}, which is not supported: use a model "
                f"quantized by one of {', '.join(ALGORITHMS)}"
            )
        if algorithm == "FP8":
            return stored_fp8(linear, "weight_scale", None, "tensor", "input_scale")
        if algorithm == "FP8_PER_CHANNEL_PER_TOKEN":
            return stored_fp8(linear, "weight_scale", None, "token")
        if algorithm == "FP8_PB_WO":
            return stored_fp8(linear, "weight_scale", (128, 128), None)
        group_size = given.group_size if layer is None else layer.group_size
        return stored_int4(linear, 128 if group_size is None else group_size, "weight_scale", "pre_quant_scale")

    return read


def stored_int4(linear: Linear, group_size: int, scale: str, pre_scale: str) -> StoredWeight:
    """A weight as Model Optimizer packs it: integers with sign, two outputs in a byte, ``[out / 2, in]``."""
    (out, inputs), columns = linear.shape, linear.check_groups(group_size)
    packed = linear.take("weight", ("U8", "I8"), (out // 2, inputs))
    scales = linear.take(scale, FLOATS, (out, inputs // columns))
    factor = None if linear.find(pre_scale) is None else linear.take(pre_scale, FLOATS, (inputs,), (1, inputs))
    kind = WeightFormat(kind="int4", block=(1, columns), pre_scale=factor is not None, scale_dtype=scales.dtype)

    def unpack() -> QuantizedWeight:
        pairs = packed.load().view(np.uint8)
        # Flipping the sign's bit adds 8.
        values = np.stack([pairs & 15, pairs >> 4], axis=1).reshape(out, inputs) ^ 8
        own = None if factor is None else factor.load().astype(np.float32).reshape(-1)
        return QuantizedWeight(kind, values, scales.load(), pre_scale=own)

    tensors = (packed, scales) if factor is None else (packed, scales, factor)
    return StoredWeight(linear.name, linear.shape, kind, tensors, unpack)


MODELOPT = Dialect(
    name="modelopt",
    library="NVIDIA's Model Optimizer",
    file="hf_quant_config.json",
    keys=(
        KeyRule("honored", "the dialect", ("quant_method",)),
        KeyRule("honored", "the keys that follow, in the file", ("quantization",)),
        *SECTION_KEYS,
        KeyRule("honored", "a layer is quantized if its tensors are", ("ignore",)),
        KeyRule("harmless", "`quant_algo` says the same", ("config_groups",)),
        KeyRule("harmless", "the cache has scales of its own", ("kv_cache_scheme",)),
        KeyRule("harmless", "where it comes from", ("producer",)),
    ),
    reader=reader,
)
