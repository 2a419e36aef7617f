"""What a SAW engine cannot have, rejected before TensorRT runs, each with the flag to change."""

from __future__ import annotations

import functools
from collections.abc import Iterable, Mapping
from typing import Any

from saw_trtllm.errors import ConfigError
from saw_trtllm.format import TOKENS_PER_BLOCK

#: Query heads of a KV head that the kernels take.
MAX_GROUP = 16


def check_build(config: Any, plugin_config: Any, limits: Mapping[str, Any]) -> None:
    """Reject a build.

    Parameters
    ----------
    config : tensorrt_llm.models.PretrainedConfig
    plugin_config : tensorrt_llm.plugin.PluginConfig
    limits : dict
        What TensorRT-LLM's ``build`` passes to ``prepare_inputs``.

    Raises
    ------
    ConfigError
        In one sentence, the first thing that does not fit.
    """
    valid = ", ".join(map(str, TOKENS_PER_BLOCK))
    tokens = plugin_config.tokens_per_block
    rejections: Iterable[tuple[bool, str]] = (
        (
            limits.get("max_beam_width", 1) != 1,
            f"beam width {limits.get('max_beam_width')} is not supported with a SAW cache: give --max_beam_width 1",
        ),
        (
            limits.get("max_draft_len", 0) > 0 or limits.get("speculative_decoding_draft_tokens_external", False),
            "speculative decoding is not supported with a SAW cache: leave out --speculative_decoding_mode and "
            "--max_draft_len",
        ),
        (
            plugin_config.lora_plugin is not None,
            "LoRA is not supported with a SAW cache: give --lora_plugin disable",
        ),
        (
            plugin_config.use_fp8_context_fmha,
            "FP8 context attention is not supported with a SAW cache: give --use_fp8_context_fmha disable",
        ),
        (
            plugin_config.gpt_attention_plugin is None,
            "TensorRT-LLM's in-flight batching asks for its attention plugin, which SAW's stand in for: give "
            "--gpt_attention_plugin auto",
        ),
        (
            not plugin_config.remove_input_padding,
            "a SAW cache takes packed tokens only: give --remove_input_padding enable",
        ),
        (
            not (limits.get("use_cache", True) and plugin_config.paged_kv_cache),
            "a SAW cache is paged: give --kv_cache_type paged",
        ),
        (
            not plugin_config.use_paged_context_fmha,
            "block reuse and chunked prefill go by a switch that is off: give --use_paged_context_fmha enable",
        ),
        (
            tokens not in TOKENS_PER_BLOCK,
            f"tokens_per_block {tokens} breaks the alignment of the cache's blocks: give --tokens_per_block {valid}",
        ),
        (
            config.dtype not in ("float16", "bfloat16"),
            f"the model's dtype is {config.dtype}, and the plugins compute in 16 bits: convert it with --dtype float16 "
            "or bfloat16",
        ),
        (
            config.quantization.kv_cache_quant_algo is not None,
            f"the checkpoint quantizes its KV cache ({config.quantization.kv_cache_quant_algo}), and a SAW cache has "
            "its own: convert the model without --kv_cache_dtype",
        ),
        (
            config.mapping.cp_size != 1,
            f"context parallelism ({config.mapping.cp_size} ranks) is not supported with a SAW cache: convert the "
            "model with --cp_size 1",
        ),
        (
            limits["max_seq_len"] > config.max_position_embeddings,
            f"max_seq_len {limits['max_seq_len']} is beyond the {config.max_position_embeddings} positions of the "
            "model's RoPE table: lower --max_seq_len, or raise max_position_embeddings in the checkpoint's config.json",
        ),
    )
    for is_rejected, message in rejections:
        if is_rejected:
            raise ConfigError(message)


def check_attention(name: str, attention: Any) -> None:
    """Reject an attention layer that the plugins cannot stand in for.

    Parameters
    ----------
    name : str
        In the model.
    attention : tensorrt_llm.layers.attention.Attention, or its row-wise FP8 twin, which has none of what is optional
    """
    optional = functools.partial(getattr, attention)
    if optional("cross_attention", False):
        raise ConfigError(f"{name} is a cross attention, which a SAW cache does not have: build a decoder-only model")
    problems = {
        f"position embedding {_name(attention.position_embedding_type)}": _name(attention.position_embedding_type)
        != "rope_gpt_neox",
        f"RoPE on {attention.rotary_embedding_dim} of {attention.attention_head_size} channels": (
            attention.rotary_embedding_dim != attention.attention_head_size
        ),
        f"the mask {_name(attention.attention_mask_type)}": _name(attention.attention_mask_type) != "causal",
        "a relative attention bias": optional("relative_attention", False),
        "logn scaling": optional("use_logn_scaling", False),
        "clipped Q, K and V": optional("clip_qkv", None) is not None,
        "a norm after attention": optional("inner_layernorm", None) is not None,
        "Q, K and V projected apart": attention.qkv is None,
        "a q/k norm with weights for each head": optional("qk_layernorm", False) and not attention.layernorm_share,
    }
    _reject(name, problems)
    check_heads(attention.num_attention_heads, attention.num_attention_kv_heads)


def check_call(name: str, call: Mapping[str, Any]) -> None:
    """Reject a call of ``gpt_attention`` that the plugins cannot stand in for.

    Parameters
    ----------
    name : str
        Of the layer.
    call : dict
        Its arguments by name.
    """
    if call["do_cross_attention"]:
        raise ConfigError(f"{name} is a cross attention, which a SAW cache does not have: build a decoder-only model")
    if call["is_mla_enabled_flag"]:
        raise ConfigError(f"{name} is a multi-head latent attention (MLA), which has no keys and values to quantize")
    unset = (
        *("attention_mask", "attention_packed_mask", "alibi_slopes", "relative_attention_bias", "logn_scaling"),
        *("qkv_bias", "spec_decoding_packed_mask", "long_rope_rotary_cos_sin", "mrope_rotary_cos_sin", "skip_attn"),
        *("kv_orig_quant_scale", "attention_output_orig_quant_scale"),
    )
    problems = {argument: call[argument] is not None for argument in unset}
    problems |= {
        f"position embedding {_name(call['position_embedding_type'])}": _name(call["position_embedding_type"])
        != "rope_gpt_neox",
        f"RoPE on {call['rotary_embedding_dim']} of {call['hidden_size_per_head']} channels": (
            call["rotary_embedding_dim"] != call["hidden_size_per_head"]
        ),
        f"the mask {_name(call['mask_type'])}": _name(call["mask_type"]) != "causal",
        "Q, K and V projected apart": isinstance(call["qkv"], list),
        "no KV cache": not call["use_cache"],
    }
    _reject(name, problems)
    check_heads(call["num_heads"], call["num_kv_heads"])


def check_heads(num_heads: int, num_kv_heads: int) -> None:
    """Reject a grouping of heads that the kernels do not have."""
    group, rest = divmod(num_heads, num_kv_heads)
    if rest or group > MAX_GROUP:
        raise ConfigError(
            f"{num_heads} query heads on {num_kv_heads} KV heads of a rank are not supported: at most {MAX_GROUP} may "
            "share one; choose another tp_size"
        )


def _reject(name: str, problems: Mapping[str, bool]) -> None:
    found = [problem for problem, there in problems.items() if there]
    if found:
        raise ConfigError(f"{name} has {', '.join(found)}, which a SAW cache does not support: build it without SAW")


def _name(member: Any) -> str:
    return getattr(member, "name", str(member))
