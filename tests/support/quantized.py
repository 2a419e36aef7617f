"""Hugging Face folders of quantized models, written as the public libraries of each dialect lay them out.

A writer gives the tensors of a linear layer and the weight that they stand for, in float32: what the library's own
kernels compute with.
"""

from __future__ import annotations

import copy
import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

E4M3 = torch.float8_e4m3fn
E4M3_MAX = torch.finfo(E4M3).max
_AWQ_ORDER = (0, 2, 4, 6, 1, 3, 5, 7)  # of the columns in a word, from the lowest bits up

Tensors = dict[str, torch.Tensor]
Writer = Callable[[torch.Tensor], tuple[Tensors, torch.Tensor]]


@dataclass(frozen=True)
class Case:
    """A dialect with one of its settings.

    Attributes
    ----------
    write : callable
    config : dict
        The ``quantization_config``, or what the file of :attr:`file` holds.
    file : str
    formats : dict
        What of the format is known of every layer.
    """

    write: Writer
    config: dict[str, Any]
    file: str = "config.json"
    formats: dict[str, Any] = field(default_factory=dict)


def pack(values: torch.Tensor, bits: int, axis: int, order: tuple[int, ...] | None = None) -> torch.Tensor:
    """Integers to int32 words along an axis, the first in the lowest bits unless an ``order`` says otherwise."""
    each = 32 // bits
    words = values.to(torch.int64).movedim(axis, -1).unflatten(-1, (-1, each))
    words = words[..., list(order)] if order else words
    packed = (words << (torch.arange(each) * bits)).sum(-1)
    return packed.to(torch.int32).movedim(-1, axis).contiguous()  # the low 32 bits


def round_groups(weight: torch.Tensor, group: int, bits: int, symmetric: bool) -> tuple[torch.Tensor, ...]:
    """Codes ``[out, in]``, scales and zero points ``[out, groups]``; scales are float16 numbers."""
    top = 2**bits - 1
    grouped = weight.unflatten(1, (-1, group))
    low, high = grouped.amin(-1).clamp(max=0), grouped.amax(-1).clamp(min=0)
    if symmetric:
        high = torch.maximum(-low, high)
        low = -high
    scales = ((high - low) / top).clamp(min=1e-5).half()
    zeros = torch.full_like(low, 2 ** (bits - 1)) if symmetric else (-low / scales.float()).round().clamp(0, top)
    codes = (grouped / scales.float()[..., None] + zeros[..., None]).round().clamp(0, top)
    return codes.flatten(1).int(), scales, zeros.int()


def spread(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """``[out, groups]`` to the shape of a weight."""
    return x.float().repeat_interleave(weight.shape[1] // x.shape[1], 1)


def awq(group: int) -> Writer:
    """AutoAWQ's GEMM format."""

    def write(weight: torch.Tensor) -> tuple[Tensors, torch.Tensor]:
        codes, scales, zeros = round_groups(weight, group if group > 0 else weight.shape[1], 4, False)
        tensors = {
            "qweight": pack(codes.T, 4, 1, _AWQ_ORDER),
            "qzeros": pack(zeros.T, 4, 1, _AWQ_ORDER),
            "scales": scales.T.contiguous(),
        }
        return tensors, (codes - spread(zeros, weight)) * spread(scales, weight)

    return write


def gptq(group: int, bits: int = 4, sym: bool = True, version: int = 1, desc_act: bool = False) -> Writer:
    """AutoGPTQ's and GPTQModel's format."""

    def write(weight: torch.Tensor) -> tuple[Tensors, torch.Tensor]:
        out, inputs = weight.shape
        columns = group if group > 0 else inputs
        order = torch.randperm(inputs, generator=torch.Generator().manual_seed(inputs)) if desc_act else None
        taken = weight if order is None else weight[:, order]
        codes, scales, zeros = round_groups(taken, columns, bits, sym)
        index = torch.arange(inputs) // columns
        if order is not None:
            back = order.argsort()
            codes, index = codes[:, back], index[back]
        qzeros = pack(zeros.T, bits, 1)
        if version == 1:
            # GPTQModel takes 1 off each zero point by a subtraction of whole words.
            ones = sum(1 << i for i in range(0, 32, bits))
            qzeros = ((qzeros.long() - ones) & 0xFFFFFFFF).to(torch.int32)
        tensors = {
            "qweight": pack(codes.T, bits, 0),
            "qzeros": qzeros,
            "scales": scales.T.contiguous(),
            "g_idx": index.int(),
            "bias": torch.zeros(out, dtype=torch.float16),
        }
        return tensors, (codes - zeros[:, index]) * scales[:, index].float()

    return write


def to_e4m3(weight: torch.Tensor, scales: torch.Tensor) -> torch.Tensor:
    """Values, for scales that are broadcast."""
    return (weight / scales).clamp(-E4M3_MAX, E4M3_MAX).to(E4M3)


def fp8_channel(weight: torch.Tensor) -> tuple[Tensors, torch.Tensor]:
    """A scale for each output channel, ``[out, 1]``."""
    scales = weight.abs().amax(1, keepdim=True) / E4M3_MAX
    values = to_e4m3(weight, scales)
    return {"weight": values, "weight_scale": scales}, values.float() * scales


def fp8_tensor(scale: str = "weight_scale", input_scale: str | None = "input_scale") -> Writer:
    """A scale for the weight, and one for its input."""

    def write(weight: torch.Tensor) -> tuple[Tensors, torch.Tensor]:
        scales = weight.abs().amax() / E4M3_MAX
        values = to_e4m3(weight, scales)
        tensors = {"weight": values, scale: scales.clone()}
        if input_scale is not None:
            tensors[input_scale] = torch.tensor(0.02)
        return tensors, values.float() * scales

    return write


def fp8_block(scale: str) -> Writer:
    """A scale for each block of 128 by 128."""

    def write(weight: torch.Tensor) -> tuple[Tensors, torch.Tensor]:
        out, inputs = weight.shape
        padded = torch.nn.functional.pad(weight, (0, -inputs % 128, 0, -out % 128))
        blocks = padded.unflatten(0, (-1, 128)).unflatten(2, (-1, 128))
        scales = blocks.abs().amax((1, 3)) / E4M3_MAX
        full = scales.repeat_interleave(128, 0).repeat_interleave(128, 1)[:out, :inputs]
        values = to_e4m3(weight, full)
        return {"weight": values, scale: scales}, values.float() * full

    return write


def modelopt_int4(group: int, factors: bool = True) -> Writer:
    """Model Optimizer's packing: integers with sign, output channels 2i and 2i + 1 in the halves of a byte."""

    def write(weight: torch.Tensor) -> tuple[Tensors, torch.Tensor]:
        factor = torch.linspace(0.5, 2.0, weight.shape[1]) if factors else torch.ones(weight.shape[1])
        factor = factor.half().float()
        grouped = (weight / factor).unflatten(1, (-1, group))
        scales = (grouped.abs().amax(-1) / 7).half()
        values = (grouped / scales.float()[..., None]).round().clamp(-8, 7).flatten(1).to(torch.int8)
        nibbles = values.view(torch.uint8) & 15
        tensors = {"weight": nibbles[0::2] | nibbles[1::2] << 4, "weight_scale": scales}
        if factors:
            tensors["pre_quant_scale"] = factor.half()
        return tensors, values.float() * spread(scales, weight) * factor

    return write


def write_quantized(
    folder: Path, model: torch.nn.Module, source: Path, case: Case, ignore: tuple[str, ...] = ()
) -> Path:
    """Write a quantized model to ``folder``, and give ``model`` the weights that it stands for.

    Parameters
    ----------
    folder : Path
    model : transformers.PreTrainedModel
        In float32; what its linear layers have afterwards is the oracle.
    source : Path
        Where the model was saved.
    case : Case
    ignore : tuple of str
        Ends of the names of layers that stay as they are, beside ``lm_head``.
    """
    shutil.copytree(source, folder)
    (folder / "model.safetensors").unlink()
    tensors = load_file(source / "model.safetensors")
    with torch.no_grad():
        for name, module in model.named_modules():
            if isinstance(module, torch.nn.Linear) and not name.endswith(("lm_head", *ignore)):
                stored, weight = case.write(module.weight)
                module.weight.copy_(weight)
                del tensors[f"{name}.weight"]
                tensors |= {
                    f"{name}.{suffix}": x for suffix, x in stored.items() if suffix != "bias" or module.bias is None
                }
    tensors["model.layers.0.self_attn.k_proj.k_scale"] = torch.tensor(0.1)
    tensors["model.layers.0.self_attn.v_proj.v_scale"] = torch.tensor(0.1)
    save_file({name: x.contiguous() for name, x in tensors.items()}, folder / "model.safetensors")
    config = json.loads((folder / "config.json").read_text())
    if case.file == "config.json":
        config["quantization_config"] = case.config
    else:
        (folder / case.file).write_text(json.dumps(case.config))
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def _modelopt(algorithm: str, **settings: Any) -> dict[str, Any]:
    section = {"quant_algo": algorithm, "kv_cache_quant_algo": "FP8", "exclude_modules": ["lm_head"], **settings}
    return {"producer": {"name": "modelopt", "version": "0.29.0"}, "quantization": section}


_GPTQ = {"quant_method": "gptq", "bits": 4, "group_size": 32, "desc_act": False, "sym": True, "damp_percent": 0.01}
_GPTQ |= {"true_sequential": True, "static_groups": False, "model_name_or_path": None, "model_file_base_name": "model"}
_NEW_GPTQ = {"quant_method": "gptq", "bits": 4, "group_size": 32, "desc_act": False, "sym": False, "lm_head": False}
_NEW_GPTQ |= {
    "pack_dtype": "int32",
    "meta": {"quantizer": ["gptqmodel:2.0.0"], "uri": "https://github.com/modelcloud/gptqmodel"},
}
_AWQ = {"quant_method": "awq", "bits": 4, "group_size": 32, "version": "gemm", "zero_point": True}
_AWQ |= {"modules_to_not_convert": None}
_INT4 = {"kind": "int4", "block": (1, 32)}

#: As the configs of published models have them, with smaller groups.
CASES: dict[str, Case] = {
    "awq": Case(awq(32), _AWQ, formats=_INT4 | {"zeros": True, "scale_dtype": "float16"}),
    "awq -1": Case(awq(-1), _AWQ | {"group_size": -1}, formats={"kind": "int4", "zeros": True}),
    "awq's file": Case(
        awq(32), {"zero_point": True, "q_group_size": 32, "w_bit": 4, "version": "GEMM"}, "quant_config.json", _INT4
    ),
    "gptq": Case(gptq(32), _GPTQ, formats=_INT4 | {"zeros": False}),
    "gptq -1": Case(gptq(-1), _GPTQ | {"group_size": -1}, formats={"kind": "int4"}),
    "gptq's file": Case(gptq(32), _GPTQ | {"is_marlin_format": False}, "quantize_config.json", _INT4),
    "gptq zeros": Case(
        gptq(32, sym=False), _NEW_GPTQ | {"sym": False, "checkpoint_format": "gptq"}, formats=_INT4 | {"zeros": True}
    ),
    "gptq v2": Case(
        gptq(32, sym=False, version=2),
        _NEW_GPTQ | {"sym": False, "checkpoint_format": "gptq_v2"},
        formats=_INT4 | {"zeros": True},
    ),
    "gptq 8 bits": Case(
        gptq(32, bits=8, sym=False), _NEW_GPTQ | {"sym": False, "bits": 8}, formats={"kind": "int8", "zeros": True}
    ),
    "gptq desc_act": Case(gptq(32, desc_act=True), _GPTQ | {"desc_act": True}, formats=_INT4 | {"act_order": True}),
    "fbgemm_fp8": Case(
        fp8_channel,
        {"quant_method": "fbgemm_fp8", "activation_scale_ub": 1200.0, "modules_to_not_convert": ["lm_head"]},
        formats={"kind": "fp8", "activation": "token"},
    ),
    "fp8 blocks": Case(
        fp8_block("weight_scale_inv"),
        {
            "quant_method": "fp8",
            "activation_scheme": "dynamic",
            "fmt": "e4m3",
            "weight_block_size": [128, 128],
            "scale_fmt": "ue8m0",
        },
        formats={"kind": "fp8", "activation": "block"},
    ),
    "fp8 static": Case(
        fp8_tensor(),
        {
            "quant_method": "fp8",
            "activation_scheme": "static",
            "ignored_layers": ["lm_head"],
            "kv_cache_scheme": "static",
        },
        formats={"kind": "fp8", "activation": "tensor"},
    ),
    "modelopt FP8": Case(
        fp8_tensor(), _modelopt("FP8", group_size=None), "hf_quant_config.json", {"kind": "fp8", "activation": "tensor"}
    ),
    "modelopt FP8 by channel": Case(
        fp8_channel,
        _modelopt("FP8_PER_CHANNEL_PER_TOKEN"),
        "hf_quant_config.json",
        {"kind": "fp8", "activation": "token"},
    ),
    "modelopt FP8 blocks": Case(
        fp8_block("weight_scale"), _modelopt("FP8_PB_WO"), "hf_quant_config.json", {"kind": "fp8", "activation": None}
    ),
    "modelopt AWQ": Case(
        modelopt_int4(32),
        _modelopt("W4A16_AWQ", group_size=32, has_zero_point=False, pre_quant_scale=True),
        "hf_quant_config.json",
        _INT4 | {"pre_scale": True},
    ),
}


def grouped(name: str, group: int) -> Case:
    """One of :data:`CASES` in groups of another size."""
    case = CASES[name]
    writers = {"awq": awq, "gptq": gptq, "modelopt AWQ": modelopt_int4, "gptq zeros": partial(gptq, sym=False)}
    config = copy.deepcopy(case.config)
    config.get("quantization", config)["group_size"] = group
    return replace(case, write=writers[name](group), config=config, formats=case.formats | {"block": (1, group)})


def compressed_tensors(weights: dict[str, Any], inputs: dict[str, Any] | None, format: str) -> Case:
    """llm-compressor's format, by its own library: what it packs, and what it unpacks again."""
    from compressed_tensors.compressors import BaseCompressor
    from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme
    from compressed_tensors.quantization.utils import calculate_qparams

    args = QuantizationArgs(**weights)
    activations = None if inputs is None else QuantizationArgs(**inputs)
    scheme = QuantizationScheme(targets=["Linear"], weights=args, input_activations=activations, format=format)
    library = BaseCompressor.get_value_from_registry(format)

    def write(weight: torch.Tensor) -> tuple[Tensors, torch.Tensor]:
        if args.strategy == "block":
            blocks = torch.nn.functional.pad(weight, (0, -weight.shape[1] % 128, 0, -len(weight) % 128))
            blocks = blocks.unflatten(0, (-1, 128)).unflatten(2, (-1, 128))
            low, high = blocks.amin((1, 3)), blocks.amax((1, 3))
        elif args.strategy == "tensor":
            low, high = weight.amin().view(1), weight.amax().view(1)
        else:
            groups = weight.unflatten(1, (-1, args.group_size or weight.shape[1]))
            low, high = groups.amin(-1), groups.amax(-1)
        scales, zeros = calculate_qparams(low, high, args)
        tensors = {"weight": weight.detach(), "weight_scale": scales}
        tensors |= {} if args.symmetric else {"weight_zero_point": zeros.to(torch.int8)}
        tensors = library.compress(tensors, scheme)
        unpacked = library.decompress(tensors, scheme)["weight"]
        if activations is not None and not activations.dynamic:
            tensors["input_scale"] = torch.tensor([0.02])
        return tensors, unpacked.float()

    group = {"targets": ["Linear"], "weights": args.model_dump(mode="json"), "output_activations": None}
    group["input_activations"] = None if activations is None else activations.model_dump(mode="json")
    config = {
        "config_groups": {"group_0": group},
        "format": format,
        "global_compression_ratio": None,
        "ignore": ["lm_head"],
        "kv_cache_scheme": None,
        "quant_method": "compressed-tensors",
        "quantization_status": "compressed",
        "sparsity_config": {},
        "transform_config": {},
        "version": "0.11.0",
    }
    return Case(write, config)


_INT = {"type": "int", "strategy": "group", "group_size": 32}
_FP8 = {"type": "float", "num_bits": 8}
_TOKEN = _FP8 | {"strategy": "token", "dynamic": True}
#: Settings of :func:`compressed_tensors`: llm-compressor's presets.
PRESETS: dict[str, tuple[dict[str, Any], dict[str, Any] | None, str]] = {
    "W4A16": (_INT | {"num_bits": 4}, None, "pack-quantized"),
    "W4A16 with zero points": (_INT | {"num_bits": 4, "symmetric": False}, None, "pack-quantized"),
    "W4A16 by channel": ({"type": "int", "num_bits": 4, "strategy": "channel"}, None, "pack-quantized"),
    "W8A16": (_INT | {"num_bits": 8, "actorder": "weight"}, None, "pack-quantized"),
    "FP8 by channel": (_FP8 | {"strategy": "channel"}, _TOKEN, "float-quantized"),
    "FP8 by tensor": (_FP8 | {"strategy": "tensor"}, _FP8 | {"strategy": "tensor"}, "float-quantized"),
    "FP8 by block": (
        _FP8 | {"strategy": "block", "block_structure": [128, 128]},
        _FP8 | {"strategy": "group", "group_size": 128, "dynamic": True},
        "float-quantized",
    ),
}
