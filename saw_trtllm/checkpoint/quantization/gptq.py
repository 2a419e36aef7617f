"""GPTQ as AutoGPTQ and GPTQModel write it: 4 or 8 bits, eight or four columns of inputs in a word."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import numpy as np
from pydantic import AliasChoices, Field

from saw_trtllm.checkpoint.families.family import OFF, KeyRule
from saw_trtllm.checkpoint.quantization.dialect import (
    FLOATS,
    Dialect,
    Linear,
    Settings,
    StoredWeight,
    parse,
    spread_words,
    words,
)
from saw_trtllm.errors import CheckpointError
from saw_trtllm.model.quantization import QuantizedWeight, WeightFormat


class GptqSettings(Settings):
    """What is read of them."""

    bits: Literal[4, 8]
    group_size: int = 128
    desc_act: bool = False
    sym: bool = True
    checkpoint_format: Literal["gptq", "gptq_v2"] = Field(
        "gptq", validation_alias=AliasChoices("checkpoint_format", "format")
    )
    dynamic: dict[str, dict[str, Any]] | None = None


def reader(settings: dict[str, Any], path: Path) -> Callable[[Linear], StoredWeight | None]:
    """See :class:`Dialect`."""
    given = parse(GptqSettings, settings, path, "gptq")
    changed = next((name for name in given.dynamic or {} if not name.startswith("-:")), None)
    if changed is not None:
        raise CheckpointError(
            f"{path} gives layers like {changed!r} GPTQ settings of their own (dynamic), which is not supported: use a "
            "model with one setting"
        )

    def read(linear: Linear) -> StoredWeight | None:
        if linear.find("qweight") is None:
            return None
        (out, inputs), each = linear.shape, 32 // given.bits
        columns = linear.check_groups(given.group_size)
        groups = inputs // columns
        qweight = linear.take("qweight", ("I32",), (inputs // each, out))
        qzeros = linear.take("qzeros", ("I32",), (groups, out // each))
        scales = linear.take("scales", FLOATS, (groups, out))
        tensors = [qweight, qzeros, scales]
        if linear.find("g_idx") is not None:
            tensors.append(linear.take("g_idx", ("I32",), (inputs,)))
        elif given.desc_act:
            linear.take("g_idx", ("I32",))
        kind = WeightFormat(
            kind="int4" if given.bits == 4 else "int8",
            block=(1, columns),
            zeros=not given.sym,
            act_order=given.desc_act and columns < inputs,  # one group has no order
            scale_dtype=scales.dtype,
        )
        return StoredWeight(
            linear.name, linear.shape, kind, tuple(tensors), lambda: _unpack(kind, given, linear.name, *tensors)
        )

    return read


def _unpack(kind: WeightFormat, given: GptqSettings, name: str, *tensors: Any) -> QuantizedWeight:
    qweight, qzeros, scales = tensors[:3]
    values = words(qweight, given.bits, 0).T
    stored = np.ascontiguousarray(qzeros.load()).view(np.uint32)
    if given.checkpoint_format == "gptq":
        # Version 1 stores zero points less 1, subtracted from whole words: a 0 borrows from its neighbor, and the sum
        # over the word gives each back.
        stored = stored + np.uint32(0x11111111 if given.bits == 4 else 0x01010101)
    zeros = spread_words(stored, given.bits, 1).T
    if given.sym and not (zeros == kind.zero).all():
        raise CheckpointError(
            f"{qzeros.path}: tensor {qzeros.name!r} has zero points other than {kind.zero}, where the config says that "
            "the weights are symmetric: use the config that belongs to these weights"
        )
    order = tensors[3].load() if len(tensors) > 3 else None
    natural = np.arange(values.shape[1]) // kind.block[1]
    if order is not None and not given.desc_act and not np.array_equal(order, natural):
        raise CheckpointError(
            f"{tensors[3].path}: the columns of {name!r} are in an order of their own, where the config says desc_act "
            "false: use the config that belongs to these weights"
        )
    if order is not None and not ((order >= 0) & (order < len(scales.load()))).all():
        raise CheckpointError(
            f"{tensors[3].path}: tensor {tensors[3].name!r} names groups that are not there: download it again"
        )
    return QuantizedWeight(
        kind,
        np.ascontiguousarray(values),
        scales.load().T,
        None if given.sym else zeros,
        order.astype(np.int32) if kind.act_order and order is not None else None,
    )


GPTQ = Dialect(
    name="gptq",
    library="AutoGPTQ, GPTQModel",
    file="quantize_config.json",
    keys=(
        KeyRule("honored", "the dialect", ("quant_method",)),
        KeyRule("honored", "4 and 8; others are rejected", ("bits",)),
        KeyRule("honored", "-1, or what divides a layer's inputs", ("group_size",)),
        KeyRule("honored", "the order of columns, `g_idx`; TensorRT's engines do not take it", ("desc_act",)),
        KeyRule("honored", "whether zero points are read; where they are not, they must be the middle", ("sym",)),
        KeyRule("honored", "`gptq` (zero points less 1) and `gptq_v2`", ("checkpoint_format", "format")),
        KeyRule("honored", "excluded layers; layers with settings of their own are rejected", ("dynamic",)),
        KeyRule("honored", "a layer is quantized if its tensors are", ("lm_head", "modules_in_block_to_quantize")),
        KeyRule("rejected", "weights laid out for another kernel", ("is_marlin_format",), OFF),
        KeyRule("rejected", "a part of the weights is in another file", ("adapter",), (None, {})),
        KeyRule("rejected", "a rotation at run time", ("rotation",), OFF),
        KeyRule("rejected", "words of other than 32 bits", ("pack_dtype",), (None, "int32")),
        KeyRule("rejected", "quantized activations", ("activation",), (None, {})),
        KeyRule(
            "harmless",
            "how it was quantized, and which kernels the library takes",
            (
                *("tokenizer", "dataset", "damp_percent", "damp_auto_increment", "act_group_aware", "true_sequential"),
                *("static_groups", "meta", "method", "mse", "model_name_or_path", "model_file_base_name", "backend"),
                *("model_seqlen", "block_name_to_quantize", "module_name_preceding_first_block", "batch_size"),
                *("pad_token_id", "max_input_length", "cache_block_outputs", "use_cuda_fp16", "use_exllama"),
                *("exllama_config", "disable_exllama", "awq_gemm_checkpoint", "parallel_packing", "mock_quantization"),
            ),
        ),
    ),
    reader=reader,
)
