"""Attention on the paged cache in a network of the project's own."""

from __future__ import annotations

from collections.abc import Mapping

from saw_trtllm.backends.tensorrt.graph import Graph, Tensor
from saw_trtllm.engine.config import EngineConfig
from saw_trtllm.plugins.layer import AttentionLayer, add_attention


def paged_attention(
    graph: Graph,
    config: EngineConfig,
    layer: int,
    qkv: Tensor,
    constants: Mapping[str, Tensor],
    inputs: Mapping[str, Tensor],
) -> Tensor:
    """Attention of a layer, as :func:`saw_trtllm.plugins.layer.add_attention` describes it.

    Parameters
    ----------
    graph : Graph
    config : EngineConfig
    layer : int
    qkv : Tensor
        ``[num_tokens, (num_heads + 2 num_kv_heads) head_dim]``. V's rotation is in the weights that made it.
    constants : dict
        The layer's, by the plugin's names.
    inputs : dict
        The engine's, by name.

    Returns
    -------
    Tensor
        ``[num_tokens, num_heads head_dim]``, in V's rotated basis.
    """
    model = config.pretrained_config
    made = AttentionLayer(
        layer,
        model.num_attention_heads,
        model.num_key_value_heads,
        model.head_size,
        config.build_config.tokens_per_block,
        model.dtype,
        config.layer_format(layer),
        # What YaRN puts on the scale is in the cosines and sines.
        softmax_scale=0.0 if model.query_pre_attn_scalar is None else model.softmax_scale,
        softcap=model.attn_logit_softcapping or 0.0,
        window=model.window(layer) or 0,
    )
    return add_attention(made, qkv, constants, inputs.__getitem__, graph.plugin)
