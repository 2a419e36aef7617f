"""Gemma 3, text alone: Gemma 2 with q/k norms in place of the scores' softcap, and two RoPEs, by a layer's window."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from saw_trtllm.checkpoint.families import gemma2
from saw_trtllm.checkpoint.families.family import Family, KeyRule, decoder_fields
from saw_trtllm.checkpoint.families.qwen3 import QK_NORMS
from saw_trtllm.errors import CheckpointError, ConfigError
from saw_trtllm.model.config import MAX_LAYERS, ModelConfig


class Gemma3Config(gemma2.GemmaConfig):
    """The keys that Gemma 3's class reads."""

    rope_local_base_freq: float | None = None
    sliding_window_pattern: int = 6


def fields(hf: Gemma3Config, path: Path) -> dict[str, Any]:
    """Translate a config: ``rope_parameters`` by layer type, or the older keys for the same."""
    if hf.sliding_window_pattern < 1:
        raise CheckpointError(f"{path} sets sliding_window_pattern to {hf.sliding_window_pattern}: it is at least 1")
    given = hf.rope_parameters or {}
    full, local = (given.get(kind) or {} for kind in ("full_attention", "sliding_attention"))
    if (
        not isinstance(full, dict)
        or not isinstance(local, dict)
        or given.keys() - {"full_attention", "sliding_attention"}
    ):
        raise CheckpointError(f"{path} sets rope_parameters to {given!r}, but a set for each layer type is needed")
    if local.get("rope_type", "default") != "default":
        raise CheckpointError(
            f"{path} scales the RoPE of its layers with a window ({local['rope_type']}), which is not supported: use a "
            "model without it"
        )
    full = {"rope_theta": 1e6 if hf.rope_theta is None else hf.rope_theta} | full | (hf.rope_scaling or {})
    base = 1e4 if hf.rope_local_base_freq is None else hf.rope_local_base_freq
    one = hf.model_copy(update={"rope_parameters": full, "rope_scaling": None, "rope_theta": None})
    found = decoder_fields(one, path) | gemma2.gemma_fields(hf, hf.sliding_window_pattern, path)
    return found | {"rope_local_base_freq": local.get("rope_theta", base)}


def trtllm_fields(raw: dict[str, Any], path: Path) -> dict[str, Any]:
    """TensorRT-LLM's own conversion has one window, and says which layers have none."""
    window, pattern, layers = (
        raw.get(k, 0) for k in ("sliding_window", "_sliding_window_pattern", "num_hidden_layers")
    )
    if all(type(number) is int and number > 0 for number in (window, pattern, layers)):
        return {"sliding_window": [window if (i + 1) % pattern else None for i in range(min(layers, MAX_LAYERS))]}
    return gemma2.trtllm_fields(raw, path)


def trtllm_writes(config: ModelConfig) -> dict[str, Any]:
    """TensorRT-LLM's definition goes by the pattern, and ours by each layer's window."""
    full = [i for i in range(config.num_hidden_layers) if config.window(i) is None]
    pattern = full[0] + 1 if full else config.num_hidden_layers + 1
    if full != [i for i in range(config.num_hidden_layers) if (i + 1) % pattern == 0]:
        raise ConfigError(
            f"the layers {', '.join(map(str, full))} have no sliding window, and TensorRT-LLM's definition takes every "
            "n-th: use another backend for this model"
        )
    return {"_sliding_window_pattern": pattern}


GEMMA3 = Family(
    name="gemma3",
    architecture="Gemma3ForCausalLM",
    config=Gemma3Config,
    fields=fields,
    layer_names=gemma2.LAYER_NAMES | QK_NORMS,
    keys=(
        *gemma2.KEYS,
        KeyRule("harmless", "this family's class reads it and does nothing", ("attn_logit_softcapping",)),
        KeyRule("harmless", "what `layer_types` says too", ("_sliding_window_pattern",)),
        KeyRule(
            "harmless",
            "of the architecture with images",
            ("text_config", "vision_config", "mm_tokens_per_image", "image_token_id"),
        ),
        KeyRule(
            "honored",
            "RoPE of the layers with a window; `rope_parameters` has a set for each layer type",
            ("rope_local_base_freq",),
        ),
        KeyRule(
            "honored",
            "of so many layers the last has no window, where `layer_types` is left out",
            ("sliding_window_pattern",),
        ),
    ),
    fixed=gemma2.FIXED | {"qk_layernorm": True},
    norm_offset=1.0,
    trtllm_class="SawGemmaForCausalLM",
    trtllm_rejects=("attn_bias",),
    trtllm_fields=trtllm_fields,
    trtllm_writes=trtllm_writes,
)
