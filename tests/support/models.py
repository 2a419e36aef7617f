"""Small random models of transformers' own classes, saved as Hugging Face folders: the oracles of several tests."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import transformers

transformers.utils.logging.disable_progress_bar()

LLAMA3_ROPE = {
    "rope_type": "llama3",
    "rope_theta": 500000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
YARN_ROPE = {"rope_type": "yarn", "rope_theta": 10000.0, "factor": 4.0, "original_max_position_embeddings": 64}
LINEAR_ROPE = {"rope_type": "linear", "rope_theta": 10000.0, "factor": 2.0}

_COMMON = {
    "vocab_size": 203,  # odd, so that lm_head needs padding under tensor parallelism
    "hidden_size": 96,
    "intermediate_size": 160,
    "num_hidden_layers": 3,
    "num_attention_heads": 8,
    "num_key_value_heads": 2,
    "head_dim": 64,
    "max_position_embeddings": 256,
    "tie_word_embeddings": False,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
#: Small enough that scores and logits of order 1 feel them.
_SOFTCAPS = {"attn_logit_softcapping": 2.0, "final_logit_softcapping": 3.0}
_TWO_ROPES = {
    "full_attention": {"rope_type": "linear", "rope_theta": 20000.0, "factor": 2.0},
    "sliding_attention": {"rope_type": "default", "rope_theta": 500.0},
}
_FAMILIES: dict[str, tuple[type, type, dict[str, Any]]] = {
    "llama": (transformers.LlamaConfig, transformers.LlamaForCausalLM, {}),
    "llama3": (
        transformers.LlamaConfig,
        transformers.LlamaForCausalLM,
        {"rope_parameters": LLAMA3_ROPE, "head_dim": 128, "num_attention_heads": 4},
    ),
    "mistral": (transformers.MistralConfig, transformers.MistralForCausalLM, {"sliding_window": 12}),
    "qwen2": (transformers.Qwen2Config, transformers.Qwen2ForCausalLM, {"rope_parameters": {"rope_theta": 1e6}}),
    "qwen3": (transformers.Qwen3Config, transformers.Qwen3ForCausalLM, {"tie_word_embeddings": True}),
    "gemma2": (
        transformers.Gemma2Config,
        transformers.Gemma2ForCausalLM,
        {"tie_word_embeddings": True, "sliding_window": 12, "query_pre_attn_scalar": 100, **_SOFTCAPS},
    ),
    "gemma3": (
        transformers.Gemma3TextConfig,
        transformers.Gemma3ForCausalLM,
        {"tie_word_embeddings": True, "sliding_window": 12, "sliding_window_pattern": 2, "rope_parameters": _TWO_ROPES},
    ),
}
FAMILIES = tuple(_FAMILIES)


def make_hf_model(
    tmp_path: Path,
    family: str,
    dtype: torch.dtype = torch.float32,
    max_shard_size: str = "50GB",
    seed: int = 0,
    **overrides: Any,
) -> tuple[Path, torch.nn.Module]:
    """Make a random model, save it under ``tmp_path / family``, and return that folder and the model.

    Parameters
    ----------
    tmp_path : Path
        Where the folder goes.
    family : str
        One of :data:`FAMILIES`: llama, llama3 (scaled RoPE, head_dim 128), mistral (sliding window), qwen2 (QKV bias),
        qwen3 (q/k norm, tied embeddings), gemma2 (1 + w norms, softcaps, windows), gemma3 (two
        RoPEs and q/k norms in place of softcaps). All have grouped queries and head_dim apart from hidden_size / heads.
    dtype : torch.dtype
        Of the saved weights and the model.
    max_shard_size : str
        Small, "100KB" say, to get several files and an index.
    seed : int
        Of the weights.
    **overrides
        Fields of the transformers config.

    Returns
    -------
    folder : Path
    model : transformers.PreTrainedModel
        In eval mode. Weights are large enough for attention to matter: logits and scores are of order 1.
    """
    config_class, model_class, fields = _FAMILIES[family]
    config = config_class(**(_COMMON | fields | overrides))
    generator = torch.Generator().manual_seed(seed)
    model = model_class(config)
    with torch.no_grad():
        for name, p in model.named_parameters():
            noise = torch.randn(p.shape, generator=generator)
            if "norm" in name:
                p.copy_((family[:5] != "gemma") + 0.1 * noise)
            elif p.ndim == 1:
                p.copy_(0.3 * noise)
            else:
                p.copy_(noise if "embed" in name and not config.tie_word_embeddings else noise / p.shape[1] ** 0.5)
    model = model.to(dtype).eval()
    folder = Path(tmp_path) / family
    model.save_pretrained(folder, max_shard_size=max_shard_size)
    return folder, model
