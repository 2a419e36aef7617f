"""transformers' ``fp8``: blocks of 128 by 128, as DeepSeek's, or a scale for each weight, as AutoFP8's and vLLM's."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

from saw_trtllm.checkpoint.families.family import KeyRule
from saw_trtllm.checkpoint.quantization.dialect import Block, Dialect, Linear, Settings, StoredWeight, parse
from saw_trtllm.checkpoint.quantization.scaled import stored_fp8


class Fp8Settings(Settings):
    """What is read of them."""

    activation_scheme: Literal["dynamic", "static"] = "dynamic"
    weight_block_size: Block | None = None
    fmt: Literal["e4m3", "float8_e4m3fn"] = "e4m3"


def reader(settings: dict[str, Any], path: Path) -> Callable[[Linear], StoredWeight | None]:
    """See :class:`Dialect`."""
    given = parse(Fp8Settings, settings, path, "fp8")

    def read(linear: Linear) -> StoredWeight | None:
        weight = linear.find("weight")
        if weight is None or weight.dtype != "F8_E4M3":
            return None
        scale = "weight_scale_inv" if linear.find("weight_scale_inv") is not None else "weight_scale"
        stored_scale = linear.find(scale)
        block = given.weight_block_size
        if "weight_block_size" not in settings and stored_scale is not None and len(stored_scale.shape) == 2:
            # transformers' default; AutoFP8 leaves the key out and has one scale.
            block = [128, 128]
        static = given.activation_scheme == "static" and block is None
        stored = "activation_scale" if linear.find("activation_scale") is not None else "input_scale"
        return stored_fp8(
            linear,
            scale,
            None if block is None else (block[0], block[1]),
            activation="tensor" if static else "token" if block is None else "block",
            input_scale=stored if static else None,
        )

    return read


FP8 = Dialect(
    name="fp8",
    library="transformers' FineGrainedFP8, AutoFP8, DeepSeek's and Qwen's own",
    file=None,
    keys=(
        KeyRule("honored", "the dialect", ("quant_method",)),
        KeyRule("honored", "`dynamic`, `static`", ("activation_scheme",)),
        KeyRule(
            "honored",
            "of the scales; null is one for each weight, and so is a key left out where there is one",
            ("weight_block_size",),
        ),
        KeyRule("honored", "`e4m3`; others are rejected", ("fmt",)),
        KeyRule("honored", "a layer is quantized if its tensors are", ("modules_to_not_convert", "ignored_layers")),
        KeyRule("rejected", "embeddings in 8 bits", ("modules_to_convert",), (None, [])),
        KeyRule("harmless", "scales are read as they are stored, in 16 or 32 bits", ("scale_fmt",)),
        KeyRule("rejected", "experts in 4 bits", ("expert_dtype",), (None, "fp8")),
        KeyRule("harmless", "the cache has scales of its own", ("kv_cache_scheme", "kv_cache_quant_method")),
        KeyRule("harmless", "what transformers does when it loads them", ("dequantize",)),
    ),
    reader=reader,
)
