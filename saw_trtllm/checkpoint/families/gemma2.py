"""Gemma 2: four norms a layer, which multiply by 1 + w, GeGLU, softcaps, and a window in every other layer."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from saw_trtllm.checkpoint.families import llama
from saw_trtllm.checkpoint.families.family import OFF, Family, KeyRule, decoder_fields, layer_types, windows
from saw_trtllm.checkpoint.families.mistral import SLIDING_WINDOW
from saw_trtllm.checkpoint.huggingface_config import HuggingFaceConfig
from saw_trtllm.errors import CheckpointError

LAYER_NAMES = llama.LAYER_NAMES | {
    "pre_feedforward_layernorm.weight": ("pre_feedforward_layernorm.weight",),
    "post_feedforward_layernorm.weight": ("post_feedforward_layernorm.weight",),
}
KEYS = (
    KeyRule("honored", "`gelu_pytorch_tanh`; others are rejected", ("hidden_activation",)),
    KeyRule("honored", "scores are q·k over its square root", ("query_pre_attn_scalar",)),
    KeyRule("honored", "of the logits", ("final_logit_softcapping",)),
    SLIDING_WINDOW,
    KeyRule("honored", "whose the window is", ("layer_types",)),
    llama.ATTENTION_BIAS,
    KeyRule("rejected", "an encoder", ("use_bidirectional_attention",), OFF),
)
FIXED = {"hidden_act": "gelu_pytorch_tanh", "inter_layernorms": True, "scale_embedding": True}


class GemmaConfig(HuggingFaceConfig):
    """The keys that the classes of both generations read."""

    num_key_value_heads: int = 4
    head_dim: int = 256
    tie_word_embeddings: bool = True
    hidden_activation: str = "gelu_pytorch_tanh"
    query_pre_attn_scalar: float = 256
    sliding_window: int | None = 4096
    layer_types: list[str] | None = None
    final_logit_softcapping: float | None = None


class Gemma2Config(GemmaConfig):
    """The keys that Gemma 2's class reads."""

    final_logit_softcapping: float | None = 30.0
    attn_logit_softcapping: float | None = 50.0


def fields(hf: Gemma2Config, path: Path) -> dict[str, Any]:
    """Translate a config."""
    found = decoder_fields(hf, path) | gemma_fields(hf, 2, path)
    return found | {"attn_logit_softcapping": hf.attn_logit_softcapping}


def gemma_fields(hf: GemmaConfig, pattern: int, path: Path) -> dict[str, Any]:
    """What Gemma's generations have in common; of ``pattern`` layers the last has no window."""
    if hf.hidden_activation != FIXED["hidden_act"]:
        raise CheckpointError(
            f"{path} sets hidden_activation to {hf.hidden_activation!r}, but only {FIXED['hidden_act']!r} is supported"
        )
    sliding = [bool((i + 1) % pattern) for i in range(hf.num_hidden_layers)]
    if hf.layer_types is not None:
        sliding = layer_types(hf.layer_types, hf.num_hidden_layers, path)
    if hf.sliding_window is None and any(sliding):
        raise CheckpointError(f"{path} sets sliding_window to null, but its layer_types need one")
    return {
        "query_pre_attn_scalar": hf.query_pre_attn_scalar,
        "final_logit_softcapping": hf.final_logit_softcapping,
        "sliding_window": windows(hf.sliding_window, sliding, path),
    }


def trtllm_fields(raw: dict[str, Any], path: Path) -> dict[str, Any]:
    """TensorRT-LLM's own conversion leaves out which layers have a window."""
    if not isinstance(raw.get("sliding_window"), Sequence):
        raise CheckpointError(
            f"{path} does not say which layers have a sliding window: convert the Hugging Face model with saw-convert"
        )
    return {}


GEMMA2 = Family(
    name="gemma2",
    architecture="Gemma2ForCausalLM",
    config=Gemma2Config,
    fields=fields,
    layer_names=LAYER_NAMES,
    keys=(*KEYS, KeyRule("honored", "of the scores", ("attn_logit_softcapping",))),
    fixed=FIXED,
    norm_offset=1.0,
    trtllm_class="SawGemmaForCausalLM",
    trtllm_rejects=("attn_bias", "qk_layernorm"),
    trtllm_fields=trtllm_fields,
)
