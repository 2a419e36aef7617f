"""Random models of each family as Hugging Face folders, made by NumPy alone: TensorRT's Python may have no PyTorch."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import save_file

VOCAB = 512
_ARCHITECTURES = {
    "llama": "Llama",
    "mistral": "Mistral",
    "qwen2": "Qwen2",
    "qwen3": "Qwen3",
    "gemma2": "Gemma2",
    "gemma3": "Gemma3",
}
FAMILIES = tuple(_ARCHITECTURES)


def make_model(folder: Path, family: str, head_dim: int, seed: int = 0) -> Path:
    """Write a model of two layers, of which each family has what is its own: a window, biases, norms, softcaps, RoPEs.

    Its weights are large enough for attention to matter: logits and scores are of order 1.
    """
    heads, kv_heads, hidden, inner = 8 if head_dim == 64 else 4, 2, 128, 256
    config: dict[str, Any] = {
        "architectures": [f"{_ARCHITECTURES[family]}ForCausalLM"],
        "model_type": family,
        "torch_dtype": "float16",
        "vocab_size": VOCAB,
        "hidden_size": hidden,
        "intermediate_size": inner,
        "num_hidden_layers": 2,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "head_dim": head_dim,
        "hidden_act": "silu",
        "rms_norm_eps": 1e-5,
        "rope_theta": 10000.0,
        "max_position_embeddings": 512,
        "tie_word_embeddings": family in ("qwen3", "gemma2", "gemma3"),
    }
    gemma, qk_norm = family in ("gemma2", "gemma3"), family in ("qwen3", "gemma3")
    if family == "mistral" or gemma:
        config["sliding_window"] = 50
    if gemma:
        config |= {"layer_types": ["sliding_attention", "full_attention"], "query_pre_attn_scalar": 100}
    if family == "gemma2":
        config |= {"attn_logit_softcapping": 2.0, "final_logit_softcapping": 3.0}
    if family == "gemma3":
        config["rope_local_base_freq"] = 500.0
    rng = np.random.default_rng(seed)

    def linear(rows: int, columns: int) -> np.ndarray:
        return rng.standard_normal((rows, columns)) / columns**0.5

    def norm(n: int) -> np.ndarray:
        return (not gemma) + 0.1 * rng.standard_normal(n)

    tensors = {"model.embed_tokens.weight": rng.standard_normal((VOCAB, hidden)), "model.norm.weight": norm(hidden)}
    if config["tie_word_embeddings"]:
        tensors["model.embed_tokens.weight"] /= hidden**0.5
    else:
        tensors["lm_head.weight"] = linear(VOCAB, hidden)
    for i in range(2):
        p = f"model.layers.{i}."
        norms = ("input", "post_attention", *(("pre_feedforward", "post_feedforward") if gemma else ()))
        tensors |= {p + f"{name}_layernorm.weight": norm(hidden) for name in norms}
        for name, count in (("q", heads), ("k", kv_heads), ("v", kv_heads)):
            tensors[p + f"self_attn.{name}_proj.weight"] = linear(count * head_dim, hidden)
            if family == "qwen2":
                tensors[p + f"self_attn.{name}_proj.bias"] = 0.3 * rng.standard_normal(count * head_dim)
        if qk_norm:
            tensors |= {p + f"self_attn.{name}_norm.weight": norm(head_dim) for name in "qk"}
        tensors[p + "self_attn.o_proj.weight"] = linear(hidden, heads * head_dim)
        tensors |= {p + f"mlp.{name}_proj.weight": linear(inner, hidden) for name in ("gate", "up")}
        tensors[p + "mlp.down_proj.weight"] = linear(hidden, inner)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config))
    save_file({name: x.astype(np.float16) for name, x in tensors.items()}, folder / "model.safetensors")
    return folder
