"""vLLM beside our engines: its caches, its model folder, and that it is there."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from saw_trtllm.errors import BackendUnavailableError, ConfigError
from saw_trtllm.model.config import ModelConfig

#: vLLM's words for a cache, and the dtype of the activations: its fp8 kernels want bfloat16.
CACHES = {"fp16": ("auto", "float16"), "fp8": ("fp8", "bfloat16")}

_FP8 = {"num_bits": 8, "type": "float", "symmetric": True}
#: ``--qformat``'s weights in dialects that vLLM reads: FP8 as llm-compressor's FP8_DYNAMIC, with inputs in 8 bits, and
#: INT4 as AutoAWQ's, which vLLM multiplies by Marlin's kernels.
QUANTIZATIONS: dict[str, dict[str, Any] | None] = {
    "full_prec": None,
    "fp8": {
        "quant_method": "compressed-tensors",
        "format": "float-quantized",
        "quantization_status": "compressed",
        "ignore": ["lm_head"],
        "config_groups": {
            "group_0": {
                "targets": ["Linear"],
                "weights": {**_FP8, "strategy": "channel", "dynamic": False},
                "input_activations": {**_FP8, "strategy": "token", "dynamic": True},
            }
        },
    },
    "int4_wo": {"quant_method": "awq", "bits": 4, "group_size": 128, "version": "gemm", "zero_point": True},
}


def chosen_caches(given: str) -> list[str]:
    """What ``--vllm`` names.

    Raises
    ------
    ConfigError
        If one is unknown.
    """
    names = [word for word in given.split(",") if word]
    if not set(names) <= set(CACHES):
        raise ConfigError(f"--vllm is {given!r}: choose among {', '.join(CACHES)}")
    return names


def import_vllm() -> Any:
    """The package, told to ask no network.

    Raises
    ------
    BackendUnavailableError
        If it is not installed.
    """
    os.environ.update(HF_HUB_OFFLINE="1", VLLM_NO_USAGE_STATS="1", VLLM_USE_FLASHINFER_SAMPLER="0")
    try:
        import vllm
    except ModuleNotFoundError as e:
        raise BackendUnavailableError(f"vLLM cannot be imported ({e}): install it beside this project") from e
    return vllm


def engine_arguments(folder: Path, shape: ModelConfig, kv: str, qformat: str = "full_prec") -> dict[str, Any]:
    """Those of all vLLM engines here: dummy weights of a shape, whose config is written to ``folder``, and a cache.

    ``qformat`` is one of :data:`QUANTIZATIONS`.

    Raises
    ------
    ConfigError
        If it is asked for a shape that this does not write for it.
    """
    if shape.architecture != "LlamaForCausalLM":
        raise ConfigError(f"vLLM is measured on Llama's shape, and the engine is of {shape.architecture}")
    config = hugging_face_config(shape)
    if (quantization := QUANTIZATIONS[qformat]) is not None:
        config["quantization_config"] = quantization
    Path(folder, "config.json").write_text(json.dumps(config))
    cache, dtype = CACHES[kv]
    return {
        "model": str(folder),
        "load_format": "dummy",
        "skip_tokenizer_init": True,
        "dtype": dtype,
        "kv_cache_dtype": cache,
        "max_num_batched_tokens": 8192,
        "enable_prefix_caching": True,
        "disable_log_stats": True,
    }


def hugging_face_config(shape: ModelConfig) -> dict[str, Any]:
    """A Llama's shape as vLLM reads it."""
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_size": shape.hidden_size,
        "intermediate_size": shape.intermediate_size,
        "num_hidden_layers": shape.num_hidden_layers,
        "num_attention_heads": shape.num_attention_heads,
        "num_key_value_heads": shape.num_key_value_heads,
        "head_dim": shape.head_size,
        "vocab_size": shape.vocab_size,
        "rms_norm_eps": shape.norm_epsilon,
        "rope_theta": shape.rotary_base,
        "max_position_embeddings": shape.max_position_embeddings,
        "hidden_act": shape.hidden_act,
        "tie_word_embeddings": False,
        "bos_token_id": 1,
        "eos_token_id": 2,
    }
