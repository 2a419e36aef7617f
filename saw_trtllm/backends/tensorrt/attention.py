"""Attention on the paged cache: the two plugins as layers."""

from __future__ import annotations

from collections.abc import Mapping

from saw_trtllm.backends.tensorrt.graph import Graph, Tensor
from saw_trtllm.engine.config import EngineConfig
from saw_trtllm.plugins.library import ATTENTION, WRITE

#: What both plugins are told of a step, in their order.
_STEP = ("last_token_ids", "sequence_length", "kv_cache_block_offsets")
_POOL = ("host_kv_cache_pool_pointers", "host_kv_cache_pool_mapping")


def paged_attention(
    graph: Graph,
    config: EngineConfig,
    layer: int,
    qkv: Tensor,
    rotary_cos_sin: Tensor,
    k_center: Tensor | None,
    inputs: Mapping[str, Tensor],
) -> Tensor:
    """RoPE, rotation, the write of the step's rows, and attention of prefills and decodes.

    Parameters
    ----------
    graph : Graph
    config : EngineConfig
    layer : int
    qkv : Tensor
        ``[num_tokens, (num_heads + 2 num_kv_heads) head_dim]``: Q, K, V, normalized but not yet turned. V's rotation
        is in the weights that made it.
    rotary_cos_sin : Tensor
        float32 ``[num_positions, head_dim / 2, 2]``.
    k_center : Tensor, optional
        float32 ``[num_kv_heads, head_dim]``.
    inputs : dict
        The engine's, by name.

    Returns
    -------
    Tensor
        ``[num_tokens, num_heads head_dim]``, in V's rotated basis.
    """
    model, fmt = config.pretrained_config, config.layer_format(layer)
    common = {
        "layer_idx": layer,
        "num_heads": model.num_attention_heads,
        "num_kv_heads": model.num_key_value_heads,
        "head_dim": model.head_size,
        "tokens_per_block": config.build_config.tokens_per_block,
        "dtype": model.dtype,
        "kv": fmt.kv,
    }
    step, pool = [inputs[name] for name in _STEP], [inputs[name] for name in _POOL]
    center = [] if k_center is None else [k_center]
    written = graph.plugin(
        WRITE,
        common
        | {"hadamard_order": fmt.hadamard_order, "rotate_v": 0, "range_factor": float(fmt.range_factor)}
        | {"use_k_center": len(center)},
        [qkv, inputs["position_ids"], *step, *pool, rotary_cos_sin, *center],
        [model.dtype] * 3 + ["int32"],
    )
    (context,) = graph.plugin(
        ATTENTION,
        # A scale of 0.0 is 1/sqrt(head_dim); what YaRN puts on it is in the table of cos and sin.
        common | {"softmax_scale": 0.0, "softcap": 0.0, "window": model.window(layer) or 0, "use_sinks": 0},
        [*written, inputs["host_request_types"], *step, *pool, inputs["host_max_attention_window_sizes"]],
        [model.dtype],
    )
    return context
