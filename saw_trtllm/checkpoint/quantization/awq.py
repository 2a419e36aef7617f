"""AutoAWQ: 4-bit groups with zero points, eight columns of outputs in a word, in an order of their own."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import numpy as np
from pydantic import AliasChoices, Field, field_validator

from saw_trtllm.checkpoint.families.family import OFF, KeyRule
from saw_trtllm.checkpoint.quantization.dialect import FLOATS, Dialect, Linear, Settings, StoredWeight, parse, words
from saw_trtllm.model.quantization import QuantizedWeight, WeightFormat

#: Where in a word of eight each output is, in steps of 4 bits (AutoAWQ's GEMM format).
_PLACES = (0, 4, 1, 5, 2, 6, 3, 7)


class AwqSettings(Settings):
    """What is read of them."""

    bits: Literal[4] = Field(4, validation_alias=AliasChoices("bits", "w_bit"))
    group_size: int = Field(128, validation_alias=AliasChoices("group_size", "q_group_size"))
    version: Literal["gemm"] = Field("gemm", validation_alias=AliasChoices("version", "format"))

    @field_validator("version", mode="before")
    @classmethod
    def _lower(cls, value: Any) -> Any:
        return value.lower() if isinstance(value, str) else value


def reader(settings: dict[str, Any], path: Path) -> Callable[[Linear], StoredWeight | None]:
    """See :class:`Dialect`."""
    given = parse(AwqSettings, settings, path, "awq")

    def read(linear: Linear) -> StoredWeight | None:
        if linear.find("qweight") is None:
            return None
        out, inputs = linear.shape
        columns = linear.check_groups(given.group_size)
        qweight = linear.take("qweight", ("I32",), (inputs, out // 8))
        qzeros = linear.take("qzeros", ("I32",), (inputs // columns, out // 8))
        scales = linear.take("scales", FLOATS, (inputs // columns, out))
        kind = WeightFormat(kind="int4", block=(1, columns), zeros=True, scale_dtype=scales.dtype)

        def unpack() -> QuantizedWeight:
            values, zeros = (_in_order(words(t, 4, 1)).T for t in (qweight, qzeros))
            return QuantizedWeight(kind, np.ascontiguousarray(values), scales.load().T, zeros)

        return StoredWeight(linear.name, linear.shape, kind, (qweight, qzeros, scales), unpack)

    return read


def _in_order(values: np.ndarray) -> np.ndarray:
    return values.reshape(len(values), -1, 8)[:, :, _PLACES].reshape(values.shape)


AWQ = Dialect(
    name="awq",
    library="AutoAWQ",
    file="quant_config.json",
    keys=(
        KeyRule("honored", "the dialect", ("quant_method",)),
        KeyRule("honored", "4; others are rejected", ("bits", "w_bit")),
        KeyRule("honored", "-1, or what divides a layer's inputs", ("group_size", "q_group_size")),
        KeyRule("honored", "`gemm`; others, as `gemv` and `marlin`, are rejected", ("version", "format")),
        KeyRule("honored", "a layer is quantized if its tensors are", ("modules_to_not_convert", "dynamic")),
        KeyRule("harmless", "zero points are read as they are stored", ("zero_point", "sym")),
        KeyRule("harmless", "which kernels the library takes", ("backend", "exllama_config", "do_fuse")),
        KeyRule("harmless", "which kernels the library takes", ("modules_to_fuse", "fuse_max_seq_len")),
        KeyRule("rejected", "words of other than 32 bits", ("pack_dtype",), (None, "int32")),
        KeyRule("rejected", "an order of columns, which the dialect has no tensor for", ("desc_act",), OFF),
        KeyRule(
            "harmless",
            "how it was quantized",
            (
                *("tokenizer", "dataset", "damp_percent", "act_group_aware", "true_sequential", "meta", "method"),
                *("model_seqlen", "block_name_to_quantize", "module_name_preceding_first_block", "batch_size"),
                *("pad_token_id", "max_input_length", "cache_block_outputs", "modules_in_block_to_quantize"),
                *("lm_head", "checkpoint_format"),
            ),
        ),
    ),
    reader=reader,
)
