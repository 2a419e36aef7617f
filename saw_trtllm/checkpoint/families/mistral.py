"""Mistral: a Llama with a sliding window in all layers, or in none."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from saw_trtllm.checkpoint.families import llama
from saw_trtllm.checkpoint.families.family import Family, KeyRule, windows

SLIDING_WINDOW = KeyRule("honored", "above 0 where a layer uses it", ("sliding_window",))


class MistralConfig(llama.LlamaConfig):
    """The keys that Mistral's class reads."""

    num_key_value_heads: int | None = 8
    sliding_window: int | None = 4096


def fields(hf: MistralConfig, path: Path) -> dict[str, Any]:
    """Translate a config."""
    sliding = [True] * hf.num_hidden_layers
    return llama.fields(hf, path) | {"sliding_window": windows(hf.sliding_window, sliding, path)}


MISTRAL = Family(
    name="mistral",
    architecture="MistralForCausalLM",
    config=MistralConfig,
    fields=fields,
    layer_names=llama.LAYER_NAMES,
    keys=(llama.HIDDEN_ACT, SLIDING_WINDOW),
    trtllm_class="SawMistralForCausalLM",
    trtllm_rejects=llama.TRTLLM_REJECTS,
)
