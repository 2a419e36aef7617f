"""Qwen3, dense: a norm over each head of Q and K in the place of Qwen2's biases."""

from __future__ import annotations

from saw_trtllm.checkpoint.families import llama, qwen2
from saw_trtllm.checkpoint.families.family import Family

QK_NORMS = {
    "attention.q_layernorm.weight": ("self_attn.q_norm.weight",),
    "attention.k_layernorm.weight": ("self_attn.k_norm.weight",),
}


class Qwen3Config(qwen2.Qwen2Config):
    """The keys that Qwen3's class reads."""

    head_dim: int = 128


QWEN3 = Family(
    name="qwen3",
    architecture="Qwen3ForCausalLM",
    config=Qwen3Config,
    fields=qwen2.fields,
    layer_names=llama.LAYER_NAMES | QK_NORMS,
    keys=(*qwen2.KEYS, llama.ATTENTION_BIAS),
    fixed={"qk_layernorm": True},
    trtllm_class="SawQWenForCausalLM",
    trtllm_writes=qwen2.trtllm_writes,
)
