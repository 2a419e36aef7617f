"""Qwen2 and Qwen2.5: biases on Q, K and V, and sliding windows from some layer on where they are switched on."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from saw_trtllm.checkpoint.families import llama
from saw_trtllm.checkpoint.families.family import Family, KeyRule, layer_types, windows
from saw_trtllm.checkpoint.families.mistral import SLIDING_WINDOW
from saw_trtllm.model.config import ModelConfig

KEYS = (
    llama.HIDDEN_ACT,
    SLIDING_WINDOW,
    KeyRule("honored", "whose the window is", ("layer_types",)),
    KeyRule("honored", "whose the window is", ("use_sliding_window", "max_window_layers")),
)


class Qwen2Config(llama.LlamaConfig):
    """The keys that Qwen2's class reads."""

    num_key_value_heads: int | None = 32
    use_sliding_window: bool = False
    sliding_window: int | None = 4096
    max_window_layers: int = 28
    layer_types: list[str] | None = None


def fields(hf: Qwen2Config, path: Path) -> dict[str, Any]:
    """Translate a config."""
    found = llama.fields(hf, path)
    if hf.use_sliding_window:
        sliding = [i >= hf.max_window_layers for i in range(hf.num_hidden_layers)]
        if hf.layer_types is not None:
            sliding = layer_types(hf.layer_types, hf.num_hidden_layers, path)
        found["sliding_window"] = windows(hf.sliding_window, sliding, path)
    return found


def trtllm_writes(config: ModelConfig) -> dict[str, Any]:
    """TensorRT-LLM's one Qwen definition tells the generations apart by qwen_type, and has no default for the rest."""
    generation = config.architecture.removesuffix("ForCausalLM").lower()
    return {"qwen_type": generation, "seq_length": 8192, "use_logn_attn": False}


QWEN2 = Family(
    name="qwen2",
    architecture="Qwen2ForCausalLM",
    config=Qwen2Config,
    fields=fields,
    layer_names=llama.LAYER_NAMES
    | {"attention.qkv.bias": ("self_attn.q_proj.bias", "self_attn.k_proj.bias", "self_attn.v_proj.bias")},
    keys=KEYS,
    fixed={"attn_bias": True},
    trtllm_class="SawQWenForCausalLM",
    trtllm_rejects=("qk_layernorm",),
    trtllm_writes=trtllm_writes,
)
