"""TensorRT-LLM's own: the section ``quantization`` of its ``config.json``, read and written."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from saw_trtllm.checkpoint.families.family import OFF, KeyRule
from saw_trtllm.checkpoint.layout import (
    LM_HEAD,
    check_tp_size,
    expected_shapes,
    is_linear,
    layer_prefix,
    shard_format,
)
from saw_trtllm.checkpoint.quantization.dialect import FLOATS, Dialect, Linear, Settings, StoredWeight, parse
from saw_trtllm.checkpoint.quantization.modelopt import stored_int4
from saw_trtllm.checkpoint.quantization.scaled import stored_fp8
from saw_trtllm.checkpoint.reader import NUMPY_DTYPES
from saw_trtllm.errors import CheckpointError, ConfigError
from saw_trtllm.model.config import ModelConfig
from saw_trtllm.model.quantization import QuantizedWeight, TensorSpec, WeightFormat, pack_nibbles

ROW_WISE = "FP8_PER_CHANNEL_PER_TOKEN"
ALGORITHMS = ("FP8", ROW_WISE, "W4A16_AWQ")
#: Ends of the names of a quantized layer's tensors, beside its weight.
_SCALES, _CHANNELS, _INPUT_SCALE = "weights_scaling_factor", "per_channel_scale", "activation_scaling_factor"
_ZEROS, _FACTORS = "zero", "prequant_scaling_factor"


class TensorRTLLMSettings(Settings):
    """What is read of them."""

    quant_algo: str | None = None
    group_size: int = 128
    has_zero_point: bool | None = False


def reader(settings: dict[str, Any], path: Path) -> Callable[[Linear], StoredWeight | None]:
    """See :class:`Dialect`."""
    given = parse(TensorRTLLMSettings, settings, path, "TensorRT-LLM")
    if given.quant_algo is not None and given.quant_algo not in ALGORITHMS:
        raise CheckpointError(
            f"{path} names the quant_algo {given.quant_algo}, which is not supported: use {', '.join(ALGORITHMS)}, or "
            "give the Hugging Face model that it was converted from with --model_dir"
        )

    def read(linear: Linear) -> StoredWeight | None:
        scale = _CHANNELS if given.quant_algo == ROW_WISE else _SCALES
        if given.quant_algo is None or linear.find(scale) is None:
            return None
        if given.quant_algo == ROW_WISE:
            return stored_fp8(linear, scale, None, "token")
        if given.quant_algo == "FP8":
            return stored_fp8(linear, scale, None, "tensor", _INPUT_SCALE)
        weight = linear.find("weight")
        if weight is not None and weight.dtype not in ("I8", "U8"):
            raise CheckpointError(
                f"{weight.path}: tensor {weight.name!r} is stored as {weight.dtype}, in the order of one GPU's "
                "kernels, but I8 as Model Optimizer writes it is needed: give the Hugging Face model that it was "
                "converted from with --model_dir"
            )
        stored = stored_int4(linear, given.group_size, scale, _FACTORS)
        return _with_zeros(linear, stored) if given.has_zero_point else stored

    return read


def _with_zeros(linear: Linear, stored: StoredWeight) -> StoredWeight:
    """A weight to whose products of codes, less 8, and scales something is added for each group."""
    added = linear.take(_ZEROS, FLOATS, stored.format.grid(linear.shape)[::-1])
    kind = stored.format.model_copy(update={"zeros": True})

    def unpack() -> QuantizedWeight:
        weight = stored.unpack()
        with np.errstate(divide="ignore", invalid="ignore"):  # of scales that are rejected after this
            points = 8 - added.load().astype(np.float32).T / weight.scales.astype(np.float32)
            # Rounding scales and products of at most 8 of them to bfloat16 moves them by a sixteenth.
            zeros = np.rint(points).clip(0, 16)
            whole = np.abs(points - zeros) < 0.25
        if not whole[weight.scales > 0].all():
            raise CheckpointError(
                f"{added.path}: {added.name!r} has what is no multiple of the weight's scales by an integer of 4 bits: "
                "copy the checkpoint again"
            )
        return replace(weight, format=kind, zeros=np.where(whole, zeros, 0).astype(np.uint8))

    return replace(stored, format=kind, tensors=(*stored.tensors, added), unpack=unpack)


def written_section(whole: Mapping[str, WeightFormat], model: ModelConfig, tp_size: int) -> dict[str, Any]:
    """The section ``quantization`` of a checkpoint.

    Parameters
    ----------
    whole : dict
        Formats of the weights that are quantized, by name.
    model : ModelConfig
    tp_size : int
        Ranks that it is split over.

    Raises
    ------
    ConfigError
        If TensorRT-LLM has no such checkpoint.
    """
    if not whole:
        return {"quant_algo": None, "kv_cache_quant_algo": None}
    check_tp_size(model, tp_size)
    formats = {name: shard_format(name, format, model, tp_size) for name, format in whole.items()}
    if len({f.model_copy(update={"scale_dtype": "float32", "block": (1, 1)}) for f in formats.values()}) > 1:
        raise _no_checkpoint("weights in several formats, and a checkpoint of TensorRT-LLM has one")
    first = next(iter(formats.values()))
    dense = [n for n in expected_shapes(model) if is_linear(n) and n not in formats]
    section = {"kv_cache_quant_algo": None, "exclude_modules": [name.removesuffix(".weight") for name in dense]}
    if first.kind == "fp8" and first.block[0] == 1 and first.activation == "tensor":
        return section | {"quant_algo": "FP8"}
    if first.kind == "fp8" and first.block[0] == 1:
        return section | {"quant_algo": ROW_WISE, "exclude_modules": _excluded_by_row_wise(dense, model)}
    if first.kind == "fp8":
        raise _no_checkpoint("FP8 weights in blocks, which TensorRT-LLM's definitions do not have")
    if first.kind == "int8" or first.act_order:
        what = "INT8 weights" if first.kind == "int8" else "INT4 weights with an order of columns"
        raise _no_checkpoint(f"{what}, which a checkpoint of TensorRT-LLM holds in the order of one GPU's kernels")
    groups = {f.block[1] for f in formats.values()}
    if len(groups) > 1:
        raise _no_checkpoint("INT4 weights in groups of several sizes, and a checkpoint of TensorRT-LLM has one")
    (group_size,) = groups
    for name in formats:
        _check_padding(name, expected_shapes(model)[name], max(64, group_size) * tp_size)
    return section | {
        "quant_algo": "W4A16_AWQ",
        "group_size": group_size,
        "has_zero_point": first.zeros,
        "pre_quant_scale": first.pre_scale,
    }


def _excluded_by_row_wise(dense: Iterable[str], model: ModelConfig) -> list[str]:
    """TensorRT-LLM has whole attentions and MLPs of it, and the norms before them quantize their inputs."""
    if model.qk_layernorm or model.inter_layernorms:
        norms = "a norm of queries and keys" if model.qk_layernorm else "norms after attention and MLP"
        raise _no_checkpoint(f"{norms} and FP8 weights by output channel, which TensorRT-LLM does not have together")
    excluded = []
    for norm, modules in (("input_layernorm", ("qkv", "dense")), ("post_layernorm", ("fc", "gate", "proj"))):
        block = "attention" if norm == "input_layernorm" else "mlp"
        for layer in range(model.num_hidden_layers):
            prefix = layer_prefix(layer)
            found = [f"{prefix}{block}.{module}.weight" in dense for module in modules]
            if any(found) != all(found):
                raise _no_checkpoint(
                    f"FP8 weights by output channel in a part of {prefix + block}, and TensorRT-LLM has them in all "
                    "of it or none"
                )
            excluded += [prefix + block, prefix + norm] if all(found) else []
    return [*sorted(excluded), *(["lm_head"] if LM_HEAD in dense else [])]


def _check_padding(name: str, shape: tuple[int, ...], multiple: int) -> None:
    if any(size % multiple for size in shape):
        raise _no_checkpoint(
            f"{name!r} of the shape {list(shape)} in INT4, and TensorRT-LLM takes multiples of {multiple} in that "
            "format"
        )


def _no_checkpoint(what: str) -> ConfigError:
    return ConfigError(
        f"the model has {what}: build it from the Hugging Face folder with --model_dir and --backend tensorrt or "
        "reference"
    )


def written_tensors(name: str, shape: tuple[int, ...], format: WeightFormat, dtype: str) -> dict[str, TensorSpec]:
    """The tensors of the weight ``name`` in such a checkpoint, of a model in ``dtype``."""
    linear = name.removesuffix("weight")
    if format.kind == "fp8":
        found = {name: TensorSpec(shape, "float8_e4m3fn")}
        if format.activation != "tensor":
            return found | {linear + _CHANNELS: TensorSpec(shape[:1], "float32")}
        return found | {linear + suffix: TensorSpec((1,), "float32") for suffix in (_SCALES, _INPUT_SCALE)}
    grid = format.grid(shape)
    found = {name: TensorSpec((shape[0] // 2, shape[1]), "int8")}
    found[linear + _SCALES] = TensorSpec(grid, format.scale_dtype)
    if format.zeros:
        found[linear + _ZEROS] = TensorSpec(grid[::-1], dtype)
    if format.pre_scale:
        found[linear + _FACTORS] = TensorSpec(shape[1:], dtype)
    return found


def write(name: str, weight: QuantizedWeight, dtype: str) -> dict[str, np.ndarray]:
    """A weight as :func:`written_tensors` names and shapes it; of one scale after :func:`with_one_scale`."""
    linear, target = name.removesuffix("weight"), np.dtype(NUMPY_DTYPES[dtype])
    if weight.input_scale is not None:
        scale = weight.scales[:1, 0].astype(np.float32)
        return {name: weight.values, linear + _SCALES: scale, linear + _INPUT_SCALE: weight.input_scale}
    if weight.format.kind == "fp8":
        return {name: weight.values, linear + _CHANNELS: weight.scales[:, 0].astype(np.float32)}
    packed = np.ascontiguousarray(pack_nibbles((weight.values ^ 8).T).T).view(np.int8)
    found = {name: packed, linear + _SCALES: weight.scales}
    if weight.zeros is not None:
        # It multiplies by scales in the model's dtype, and adds what a code of 8 stands for.
        scales = weight.scales.astype(target).astype(np.float32)
        found[linear + _ZEROS] = np.ascontiguousarray(((8 - weight.zeros.astype(np.float32)) * scales).T.astype(target))
    if weight.pre_scale is not None:
        found[linear + _FACTORS] = weight.pre_scale.astype(target)
    return found


def with_one_scale(name: str, weight: QuantizedWeight, model: ModelConfig) -> QuantizedWeight:
    """A whole weight as TensorRT-LLM takes it: where an FP8 layer's input has a stored scale, the weight has one.

    Queries, keys and values are rounded anew to the largest of their scales, as TensorRT-LLM's own converter does.

    Raises
    ------
    ConfigError
        If a weight has a scale for each output channel, and one for its input.
    """
    if weight.input_scale is None or (weight.scales == weight.scales[0, 0]).all():
        return weight
    heads = (model.num_attention_heads, model.num_key_value_heads) if name.endswith("attention.qkv.weight") else ()
    borders = np.cumsum([n * model.head_size for n in heads])
    if any((part != part[0]).any() for part in np.split(weight.scales[:, 0], borders)):
        raise _no_checkpoint("FP8 weights by output channel and stored scales of inputs, which TensorRT-LLM lacks")
    scales = weight.scales.astype(np.float32)
    values = weight.values.astype(np.float32) * scales / scales.max()
    return replace(weight, values=values.astype(weight.values.dtype), scales=np.full_like(weight.scales, scales.max()))


TENSORRT_LLM = Dialect(
    name="tensorrt_llm",
    library="TensorRT-LLM",
    file=None,
    keys=(
        KeyRule("honored", "`" + "`, `".join(ALGORITHMS) + "`; others are rejected", ("quant_algo",)),
        KeyRule("honored", "what divides a layer's inputs", ("group_size",)),
        KeyRule("honored", "factors are read where they are stored", ("pre_quant_scale",)),
        KeyRule("honored", "a layer is quantized if its tensors are", ("exclude_modules",)),
        KeyRule("honored", "`true` where the tensors `zero` are", ("has_zero_point",)),
        KeyRule("rejected", "bounds on activations", ("clamp_val",), OFF),
        KeyRule("rejected", "layers of several algorithms", ("quantized_layers",), (None, {})),
        KeyRule("harmless", "activations are not quantized in two ways", ("use_meta_recipe",)),
        KeyRule("harmless", "the cache has scales of its own", ("kv_cache_quant_algo",)),
        KeyRule("harmless", "of another algorithm", ("smoothquant_val", "mamba_ssm_cache_dtype")),
    ),
    reader=reader,
)
