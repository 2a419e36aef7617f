"""A graph-rewriting pass: each ``GPTAttention`` of a defined network becomes the two plugins.

For models whose attention is not TensorRT-LLM's own ``Attention`` class but ends in its function ``gpt_attention``. The
layers that it replaces stay in the network, dead, until TensorRT removes them; so what only they consume stays an
input of the engine, which the executor feeds as ever.
"""

from __future__ import annotations

from tensorrt_llm.graph_rewriting import FLayerInfoMemo, PatternRewriter, RewritePatternManager
from tensorrt_llm.graph_rewriting import Layer as NetworkLayer
from tensorrt_llm.mapping import Mapping
from tensorrt_llm.network import Network, net_guard

from saw_trtllm.backends.tensorrt_llm.attention import Layer, saw_attention
from saw_trtllm.backends.tensorrt_llm.checks import check_call
from saw_trtllm.backends.tensorrt_llm.options import SwapOptions
from saw_trtllm.errors import ConfigError

_KIND = "gpt_attention"


class SawAttentionPass(PatternRewriter):
    """Replaces one ``GPTAttention`` at a time.

    Parameters
    ----------
    options : SwapOptions
    layers : list of int
        Numbers in the whole model of this rank's attention layers, in order.
    mapping : Mapping
    """

    def __init__(self, options: SwapOptions, layers: list[int], mapping: Mapping):
        super().__init__(name="saw_attention", separate_match_rewrite=False)
        self._options, self._layers, self._mapping = options, layers, mapping
        self.num_replaced = 0

    def match_and_rewrite(self, layer: NetworkLayer) -> bool:
        """Replace the layer if it is an attention.

        Returns
        -------
        bool
            Whether it was, and the network has changed.
        """
        with net_guard(layer.network):
            info = FLayerInfoMemo.instance().get(layer.name)
            if info is None or info.layer_kind != _KIND:
                return False
            call = info.raw_inputs
            check_call(layer.name, call)
            context = saw_attention(call["qkv"], call["rotary_cos_sin"], self._layer(call), self._options)
            info.replace_outputs_uses_with(layer.network, (context, None))
            layer.mark_as_removed()
        self.num_replaced += 1
        return True

    def _layer(self, call: dict) -> Layer:
        number = self._layers[call["layer_idx"]]
        return Layer(
            call["layer_idx"],
            call["num_heads"],
            call["num_kv_heads"],
            call["hidden_size_per_head"],
            call["q_scaling"],
            call["attn_logit_softcapping_scale"],
            self._options.window(number),
            **self._options.local_constants(number, self._mapping.tp_size, self._mapping.tp_rank),
        )


def rewrite_attention(network: Network, options: SwapOptions, layers: list[int], mapping: Mapping) -> int:
    """Replace every attention of a network.

    Returns
    -------
    int
        How many there were.

    Raises
    ------
    ConfigError
        If there was none, or the plugins cannot stand in for one.
    """
    rewriter = SawAttentionPass(options, layers, mapping)
    manager = RewritePatternManager()
    manager.add(label=rewriter.name, pattern=rewriter)
    manager.rewrite(network)
    if rewriter.num_replaced == 0:
        raise ConfigError("the model's network has no GPTAttention to replace: its architecture is unknown to the swap")
    return rewriter.num_replaced
