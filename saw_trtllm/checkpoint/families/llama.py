"""Llama 2 and 3, and what has their architecture: SmolLM2, TinyLlama, many others."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from saw_trtllm.checkpoint.families.family import OFF, Family, KeyRule, decoder_fields, silu
from saw_trtllm.checkpoint.huggingface_config import HuggingFaceConfig

HIDDEN_ACT = KeyRule("honored", "`silu`, also as `swish`; others are rejected", ("hidden_act",))
ATTENTION_BIAS = KeyRule("rejected", "biases of the attention's projections", ("attention_bias",), OFF)

LAYER_NAMES = {
    "input_layernorm.weight": ("input_layernorm.weight",),
    "attention.qkv.weight": ("self_attn.q_proj.weight", "self_attn.k_proj.weight", "self_attn.v_proj.weight"),
    "attention.dense.weight": ("self_attn.o_proj.weight",),
    "post_layernorm.weight": ("post_attention_layernorm.weight",),
    # TensorRT-LLM's gated MLP is proj(act(fc(x)) * gate(x)): its fc is what Hugging Face calls gate_proj.
    "mlp.fc.weight": ("mlp.gate_proj.weight",),
    "mlp.gate.weight": ("mlp.up_proj.weight",),
    "mlp.proj.weight": ("mlp.down_proj.weight",),
}
#: Of TensorRT-LLM's keys: its Llama would have the bias on attention.dense as well.
TRTLLM_REJECTS = ("attn_bias", "qk_layernorm")


class LlamaConfig(HuggingFaceConfig):
    """The keys that Llama's class reads."""

    hidden_act: str = "silu"


def fields(hf: LlamaConfig, path: Path) -> dict[str, Any]:
    """Translate a config."""
    return {"hidden_act": silu(hf.hidden_act, path)} | decoder_fields(hf, path)


LLAMA = Family(
    name="llama",
    architecture="LlamaForCausalLM",
    config=LlamaConfig,
    fields=fields,
    layer_names=LAYER_NAMES,
    keys=(HIDDEN_ACT, ATTENTION_BIAS, KeyRule("rejected", "biases of the MLP", ("mlp_bias",), OFF)),
    trtllm_class="SawLLaMAForCausalLM",
    trtllm_rejects=TRTLLM_REJECTS,
)
