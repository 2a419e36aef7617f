"""TensorRT-LLM's own: the section ``quantization`` of its ``config.json``, read and written."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from saw_trtllm.checkpoint.families.family import OFF, KeyRule
from saw_trtllm.checkpoint.quantization.dialect import Dialect, Linear, Settings, StoredWeight, parse
from saw_trtllm.checkpoint.quantization.modelopt import stored_int4
from saw_trtllm.checkpoint.quantization.scaled import stored_fp8
from saw_trtllm.errors import CheckpointError, ConfigError
from saw_trtllm.model.quantization import QuantizedWeight, TensorSpec, WeightFormat, pack_nibbles

ALGORITHMS = ("FP8", "FP8_PER_CHANNEL_PER_TOKEN", "W4A16_AWQ")


class TensorRTLLMSettings(Settings):
    """What is read of them."""

    quant_algo: str | None = None
    group_size: int = 128


def reader(settings: dict[str, Any], path: Path) -> Callable[[Linear], StoredWeight | None]:
    """See :class:`Dialect`."""
    given = parse(TensorRTLLMSettings, settings, path, "TensorRT-LLM")
    if given.quant_algo is not None and given.quant_algo not in ALGORITHMS:
        raise CheckpointError(
            f"{path} names the quant_algo {given.quant_algo}, which is not supported: use {', '.join(ALGORITHMS)}, or "
            "give the Hugging Face model that it was converted from with --model_dir"
        )

    def read(linear: Linear) -> StoredWeight | None:
        scale = "per_channel_scale" if given.quant_algo == "FP8_PER_CHANNEL_PER_TOKEN" else "weights_scaling_factor"
        if given.quant_algo is None or linear.find(scale) is None:
            return None
        if given.quant_algo == "FP8_PER_CHANNEL_PER_TOKEN":
            return stored_fp8(linear, scale, None, "token")
        if given.quant_algo == "FP8":
            return stored_fp8(linear, scale, None, "tensor", "activation_scaling_factor")
        weight = linear.find("weight")
        if weight is not None and weight.dtype not in ("I8", "U8"):
            raise CheckpointError(
                f"{weight.path}: tensor {weight.name!r} is stored as {weight.dtype}, in the order of one GPU's "
                "kernels, but I8 as Model Optimizer writes it is needed: give the Hugging Face model that it was "
                "converted from with --model_dir"
            )
        return stored_int4(linear, given.group_size, scale, "prequant_scaling_factor")

    return read


def written_section(formats: dict[str, WeightFormat], exclude_modules: list[str]) -> dict[str, Any]:
    """The section ``quantization`` of a checkpoint.

    Parameters
    ----------
    formats : dict
        Of the weights that are quantized, by name.
    exclude_modules : list of str
        Names of the linear layers that are not.

    Raises
    ------
    ConfigError
        If TensorRT-LLM has no such checkpoint.
    """
    if not formats:
        return {"quant_algo": None, "kv_cache_quant_algo": None}
    if len({f.model_copy(update={"scale_dtype": "float32", "block": (1, 1)}) for f in formats.values()}) > 1:
        raise ConfigError(
            "the model has weights in several formats, and a checkpoint of TensorRT-LLM has one: build from the "
            "Hugging Face folder with --model_dir"
        )
    first = next(iter(formats.values()))
    if first.kind == "fp8" and first.block[0] == 1:
        return {
            "quant_algo": "FP8_PER_CHANNEL_PER_TOKEN",
            "kv_cache_quant_algo": None,
            "exclude_modules": exclude_modules,
        }
    groups = {f.block[1] for f in formats.values()}
    if first.kind == "int4" and not (first.zeros or first.act_order) and len(groups) == 1:
        return {
            "quant_algo": "W4A16_AWQ",
            "kv_cache_quant_algo": None,
            "group_size": first.block[1],
            "has_zero_point": False,
            "pre_quant_scale": first.pre_scale,
            "exclude_modules": exclude_modules,
        }
    what = {"int8": "INT8 weights", "fp8": "FP8 weights in blocks"}.get(first.kind, "INT4 weights of several groups")
    if first.kind == "int4" and (first.zeros or first.act_order):
        what = "INT4 weights with " + ("zero points" if first.zeros else "an order of columns")
    raise ConfigError(
        f"the model has {what}, which a checkpoint of TensorRT-LLM holds in the order of one GPU's kernels: build from "
        "the Hugging Face folder with --model_dir"
    )


def written_tensors(name: str, shape: tuple[int, ...], format: WeightFormat) -> dict[str, TensorSpec]:
    """The tensors of the weight ``name`` in such a checkpoint."""
    linear = name.removesuffix("weight")
    out, inputs = shape
    if format.kind == "fp8":
        return {
            name: TensorSpec(shape, "float8_e4m3fn"),
            linear + "per_channel_scale": TensorSpec((out, 1), "float32"),
        }
    found = {
        name: TensorSpec((out // 2, inputs), "int8"),
        linear + "weights_scaling_factor": TensorSpec(format.grid(shape), format.scale_dtype),
    }
    if format.pre_scale:
        found[linear + "prequant_scaling_factor"] = TensorSpec((inputs,), "float32")
    return found


def write(name: str, weight: QuantizedWeight) -> dict[str, np.ndarray]:
    """A weight as :func:`written_tensors` names and shapes it."""
    linear = name.removesuffix("weight")
    if weight.format.kind == "fp8":
        return {name: weight.values, linear + "per_channel_scale": weight.scales.astype(np.float32)}
    packed = np.ascontiguousarray(pack_nibbles((weight.values ^ 8).T).T).view(np.int8)
    found = {name: packed, linear + "weights_scaling_factor": weight.scales}
    return found if weight.pre_scale is None else found | {linear + "prequant_scaling_factor": weight.pre_scale}


TENSORRT_LLM = Dialect(
    name="tensorrt_llm",
    library="TensorRT-LLM",
    file=None,
    keys=(
        KeyRule("honored", "`" + "`, `".join(ALGORITHMS) + "`; others are rejected", ("quant_algo",)),
        KeyRule("honored", "what divides a layer's inputs", ("group_size",)),
        KeyRule("honored", "factors are read where they are stored", ("pre_quant_scale",)),
        KeyRule("honored", "a layer is quantized if its tensors are", ("exclude_modules",)),
        KeyRule("rejected", "zero points of integers with sign", ("has_zero_point",), OFF),
        KeyRule("rejected", "bounds on activations", ("clamp_val",), OFF),
        KeyRule("rejected", "layers of several algorithms", ("quantized_layers",), (None, {})),
        KeyRule("harmless", "activations are not quantized in two ways", ("use_meta_recipe",)),
        KeyRule("harmless", "the cache has scales of its own", ("kv_cache_quant_algo",)),
        KeyRule("harmless", "of another algorithm", ("smoothquant_val", "mamba_ssm_cache_dtype")),
    ),
    reader=reader,
)
