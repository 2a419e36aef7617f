"""One decoder for all families, whose configuration holds what differs.

All tokens of a step are packed into one dimension, prefills first. Weights come as :meth:`BuildPlan.load` gives them,
V's rotation or frame folded in. :mod:`saw_trtllm.backends.reference.model` is the same in PyTorch.
"""

from __future__ import annotations

from typing import cast

import numpy as np

from saw_trtllm.backends.tensorrt.attention import paged_attention
from saw_trtllm.backends.tensorrt.constants import (
    PRE_SCALE,
    QK_LAYERNORM,
    SCALES,
    VALUES,
    Constants,
    LoadArray,
    packed_shape,
    quantizes_input,
    rope_table,
    weight_inputs,
)
from saw_trtllm.backends.tensorrt.graph import Graph, Tensor
from saw_trtllm.backends.tensorrt.profiles import step_inputs
from saw_trtllm.checkpoint.layout import EMBEDDING, FINAL_NORM, LM_HEAD, layer_prefix, shard_format, shard_shape
from saw_trtllm.engine.config import EngineConfig, k_center_name, k_frame_name, q_frame_name
from saw_trtllm.engine.tensors import INPUT_IDS, LAST_TOKEN_IDS, LOGITS
from saw_trtllm.plugins.layer import K_CENTER, K_FRAME, Q_FRAME, ROTARY_COS_SIN


def define_decoder(graph: Graph, config: EngineConfig, load: LoadArray, rank: int = 0) -> None:
    """Define a rank's engine: its inputs, the decoder, and the output ``logits``, which all ranks have.

    Parameters
    ----------
    graph : Graph
        An empty one.
    config : EngineConfig
    load : callable
        As of :class:`Constants`: the rank's part.
    rank : int

    Raises
    ------
    ConfigError
        If TensorRT does not have the dtype.
    """
    graph.tensorrt.check_activations(config.pretrained_config.dtype)
    _Decoder(graph, config, load, rank).define()


class _Decoder:
    def __init__(self, graph: Graph, config: EngineConfig, load: LoadArray, rank: int) -> None:
        whole, size = config.pretrained_config, config.tp_size
        self.graph = graph
        self._rank, self._num_ranks = rank, size
        self._formats = {n: shard_format(n, f, whole, size) for n, f in config.saw_int4.quantized.items()}
        self._shapes = {name: shard_shape(name, whole, size) for name in self._formats}
        self._weight_inputs = weight_inputs(config)
        self.config = config = config.of_rank()
        self.model = config.pretrained_config
        self._constants = Constants(config, load)
        self._layers = range(self.model.num_hidden_layers)
        self._inputs = {
            x.name: graph.input(x.name, x.dtype, [-1 if isinstance(d, str) else d for d in x.shape])
            for x in step_inputs(config, graph.tensorrt)
        }
        tables = {self.model.has_local_rope(i) for i in self._layers}
        self._rope = {local: self._constant(rope_table(local)) for local in sorted(tables)}

    def define(self) -> None:
        """``input_ids [num_tokens]`` to ``logits [num_sequences, vocab_size]``, or of all tokens where asked for."""
        graph, embedding = self.graph, self._constant(EMBEDDING)
        x = self._embed(embedding)
        added: Tensor | None = None
        if self.model.scale_embedding:
            x = x * graph.scalar(self.model.embedding_scale, x)
        for i in self._layers:
            with graph.scope(layer_prefix(i).removesuffix(".")):
                x, added = self._layer(layer_prefix(i), i, x, added)
        x = x + (cast(Tensor, added) if self.model.inter_layernorms else self._sum(cast(Tensor, added)))
        if not self.config.build_config.gather_context_logits:
            one = graph.constant(np.ones(1, np.int32))
            x = graph.gather(x, self._inputs[LAST_TOKEN_IDS.name] - one)
        _, x = self._norm(x, FINAL_NORM)
        dtype = (self.model.model_extra or {}).get("logits_dtype", "float32")
        cap = self.model.final_logit_softcapping
        given = dtype if cap is None else "float32"
        tied = self.model.share_embedding_table
        logits = graph.linear(x, embedding, given) if tied else self._linear(x, LM_HEAD, given)
        if cap is not None:
            logits = graph.cast(graph.tanh(logits * graph.scalar(1 / cap, logits)) * graph.scalar(cap, logits), dtype)
        graph.output(graph.all_gather(logits, self.model.vocab_size, self._num_ranks), LOGITS.name)

    def _embed(self, weight: Tensor) -> Tensor:
        """Rows of the embedding, of which a rank has some: for the others it adds zeros."""
        graph, ids = self.graph, self._inputs[INPUT_IDS.name]
        if self._num_ranks == 1:
            return graph.embedding(weight, ids)
        first = graph.constant(np.full(1, self._rank * weight.handle.shape[0], np.int32))
        return graph.all_reduce(graph.embedding(weight, ids - first, partial=True), self._num_ranks)

    def _layer(self, prefix: str, i: int, x: Tensor, added: Tensor | None) -> tuple[Tensor, Tensor]:
        """``[num_tokens, hidden_size]``, and what is still to be added to it, to the same: a norm adds it.

        That is a rank's part yet, but for norms of the layers' ends.
        """
        graph, inter = self.graph, self.model.inter_layernorms
        with graph.scope("attention"):
            x, h = self._norm(x, prefix + "input_layernorm.weight", added)
            added = self._attention(prefix + "attention.", i, h)
            if inter:
                _, added = self._norm(self._sum(added), prefix + "post_layernorm.weight")
        with graph.scope("mlp"):
            before = "pre_feedforward_layernorm" if inter else "post_layernorm"
            x, h = self._norm(x, f"{prefix}{before}.weight", added)
            fc, gate, proj = (f"{prefix}mlp.{name}.weight" for name in ("fc", "gate", "proj"))
            h = self._gated(h, fc, gate)
            added = self._linear(h, proj)
            if inter:
                _, added = self._norm(self._sum(added), prefix + "post_feedforward_layernorm.weight")
            return x, added

    def _attention(self, prefix: str, i: int, x: Tensor) -> Tensor:
        """``[num_tokens, hidden_size]`` to the same."""
        graph, model = self.graph, self.model
        qkv = self._linear(x, prefix + "qkv.weight")
        if model.attn_bias:
            qkv = qkv + self._constant(prefix + "qkv.bias")
        if model.qk_layernorm:
            qkv = self._norm_qk(i, qkv)
        constants = {ROTARY_COS_SIN: self._rope[model.has_local_rope(i)]}
        if self.config.saw_int4.k_center:
            constants[K_CENTER] = self._constant(k_center_name(i))
        if i in self.config.framed_layers:
            constants[K_FRAME] = self._constant(k_frame_name(i))
            constants[Q_FRAME] = self._constant(q_frame_name(i))
        context = paged_attention(graph, self.config, i, qkv, constants, self._inputs)
        return self._linear(context, prefix + "dense.weight")

    def _linear(self, x: Tensor, name: str, dtype: str | None = None) -> Tensor:
        """``x · weightᵀ`` of a named weight, in ``dtype`` if given."""
        graph, format = self.graph, self._formats.get(name)
        if format is None:
            return graph.linear(x, self._constant(name), dtype)
        if format.pre_scale:
            x = graph.cast(graph.cast(x, "float32") * self._constant(name + PRE_SCALE), x.dtype)
        values, scales = self._constant(name + VALUES), self._constant(name + SCALES)
        shape = self._shapes[name]
        y = graph.quantized_linear(x, values, scales, packed_shape(format, shape), quantizes_input(format, shape))
        return graph.cast(y, dtype or y.dtype)

    def _gated(self, x: Tensor, fc: str, gate: str) -> Tensor:
        """``activation(x · fcᵀ) · (x · gateᵀ)`` of named weights."""
        graph, activation = self.graph, self.model.hidden_act
        if self._formats.keys() & {fc, gate} or not graph.fuses_gate(activation):
            return graph.gated(self._linear(x, fc), self._linear(x, gate), activation)
        return graph.gated_linear(x, self._constant(fc), self._constant(gate))

    def _norm(self, x: Tensor, weight: str, added: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """The sum, and its RMSNorm with a weight."""
        graph, constant, epsilon = self.graph, self._constant(weight), self.model.norm_epsilon
        if added is None or self.model.inter_layernorms:
            return graph.rms_norm(x, constant, epsilon, added)
        return graph.norm_of_sum(added, constant, epsilon, x, self._num_ranks)

    def _sum(self, x: Tensor) -> Tensor:
        """What the ranks have parts of."""
        return self.graph.all_reduce(x, self._num_ranks)

    def _norm_qk(self, layer: int, qkv: Tensor) -> Tensor:
        """RMSNorm over each head of Q and K, in ``[num_tokens, (num_heads + 2 num_kv_heads) head_dim]``."""
        H, Hkv = self.model.num_attention_heads, self.model.num_key_value_heads
        name = layer_prefix(layer) + QK_LAYERNORM
        return self.graph.norm_heads(qkv, self._constants[name], H + 2 * Hkv, H + Hkv, self.model.norm_epsilon, name)

    def _constant(self, name: str) -> Tensor:
        """What is the same in every step: an input of the engine, or a constant."""
        spec = self._weight_inputs.get(name)
        if spec is not None:
            return self.graph.input(name, spec.dtype, spec.shape)
        return self.graph.constant(self._constants[name], name)
