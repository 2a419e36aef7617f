"""The two plugins in the place of ``GPTAttention``, and the module that stands where an ``Attention`` stood."""

from __future__ import annotations

import math
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import tensorrt as trt
from tensorrt_llm._common import default_net, default_trtnet
from tensorrt_llm.functional import Tensor, _create_tensor, cast, concat, constant, matmul, shape, split
from tensorrt_llm.layers.attention import Attention
from tensorrt_llm.module import Module
from tensorrt_llm.quantization.functional import quantize_fp8_per_token
from tensorrt_llm.quantization.layers import Fp8RowwiseAttention

from saw_trtllm.backends.tensorrt_llm.options import SwapOptions
from saw_trtllm.engine.tensors import LAST_TOKEN_IDS, POSITION_IDS, SEQUENCE_LENGTH
from saw_trtllm.errors import ConfigError
from saw_trtllm.format import hadamard
from saw_trtllm.ops import pack_frame
from saw_trtllm.plugins.layer import K_CENTER, K_FRAME, Q_FRAME, ROTARY_COS_SIN, AttentionLayer, Fields, add_attention
from saw_trtllm.plugins.library import load_plugins, make_plugin

_DTYPES = {trt.DataType.HALF: "float16", trt.DataType.BF16: "bfloat16"}
#: Inputs that the executor always feeds, and that TensorRT-LLM does not declare in each engine: another input that
#: their first dimension is the same as, and the name of that dimension.
_UNDECLARED = {
    LAST_TOKEN_IDS.name: (SEQUENCE_LENGTH.name, "batch_size_last_token_ids"),
    POSITION_IDS.name: ("hidden_states_input", "position_ids_num_tokens_range"),
}


@dataclass(frozen=True, eq=False)
class Layer:
    """An attention layer of a rank.

    Attributes
    ----------
    layer_idx : int
        Among this rank's attention layers.
    num_heads, num_kv_heads : int
        Of this rank.
    head_dim : int
    q_scaling : float
        TensorRT-LLM's: scores are divided by it and by sqrt(head_dim).
    softcap : float
        0 is none.
    window : int
        Tokens that a query sees; 0 is all.
    k_center : numpy.ndarray or None
        float32 ``[num_kv_heads, head_dim]``.
    k_frame, q_frame : numpy.ndarray or None
        float32 ``[num_kv_heads, head_dim, head_dim]``.
    """

    layer_idx: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    q_scaling: float = 1.0
    softcap: float = 0.0
    window: int = 0
    k_center: np.ndarray | None = None
    k_frame: np.ndarray | None = None
    q_frame: np.ndarray | None = None


def saw_attention(qkv: Tensor, rotary_cos_sin: Tensor, layer: Layer, options: SwapOptions) -> Tensor:
    """Attention of a layer on the paged 4-bit cache.

    Parameters
    ----------
    qkv : Tensor
        ``[num_tokens, (num_heads + 2 num_kv_heads) head_dim]``, before RoPE.
    rotary_cos_sin : Tensor
        float32, a constant: (cos, sin) of each half-split pair, position by position.
    layer : Layer
    options : SwapOptions

    Returns
    -------
    Tensor
        ``[num_tokens, num_heads head_dim]``. In V's rotated basis if, and only if, the rotation is in the weights.
    """
    if qkv.dtype not in _DTYPES:
        raise ConfigError(f"the model computes in {qkv.dtype}: give --dtype float16 or bfloat16")
    fmt = options.kv_format
    rotate_v = fmt.rotate_v and not options.v_folded
    made = AttentionLayer(
        layer.layer_idx,
        layer.num_heads,
        layer.num_kv_heads,
        layer.head_dim,
        int(default_net().plugin_config.tokens_per_block),
        _DTYPES[qkv.dtype],
        fmt,
        rotate_v,
        1.0 / (layer.q_scaling * math.sqrt(layer.head_dim)),
        layer.softcap,
        layer.window,
    )
    constants = {ROTARY_COS_SIN: rotary_cos_sin}
    if layer.k_center is not None:
        constants[K_CENTER] = constant(layer.k_center)
    for name, frame in ((K_FRAME, layer.k_frame), (Q_FRAME, layer.q_frame)):
        if frame is not None:
            constants[name] = constant(pack_frame(frame))
    # TensorRT-LLM's last_token_ids is the inclusive sum of the sequences' tokens as long as none is a draft.
    context = add_attention(made, qkv, constants, network_input, add_plugin)
    return _rotate_back(context, layer, fmt.hadamard_order) if rotate_v else context


def add_plugin(name: str, fields: Fields, inputs: Sequence[Tensor], dtypes: Sequence[str]) -> list[Tensor]:
    """Add one of our plugins to the network that is being defined, and give its outputs, whose dtypes it knows.

    Raises
    ------
    BackendUnavailableError, ConfigError
        As :func:`~saw_trtllm.plugins.library.load_plugins` and :func:`~saw_trtllm.plugins.library.make_plugin`.
    """
    load_plugins(trt)
    plugin = make_plugin(trt, name, fields)
    layer = default_trtnet().add_plugin_v3([t.trt_tensor for t in inputs], [], plugin)
    return [_create_tensor(layer.get_output(i), layer) for i in range(layer.num_outputs)]


def _rotate_back(context: Tensor, layer: Layer, order: int) -> Tensor:
    """``o B``: B is its own inverse."""
    matrix = cast(constant(hadamard(order)), context.dtype)
    blocks = context.view([-1, order])
    return matmul(blocks, matrix).view([-1, layer.num_heads * layer.head_dim])


def network_input(name: str) -> Tensor:
    """An input of the network that is being defined, declared if it is not but the executor feeds it."""
    inputs = {t.name: t for t in default_net().get_inputs()}
    if name in inputs:
        return inputs[name]
    like, dimension = _UNDECLARED.get(name, (None, None))
    if like not in inputs:
        raise ConfigError(
            f"the engine has no input {name}, which its attention needs: build it with --kv_cache_type paged, "
            "--remove_input_padding enable and --gpt_attention_plugin auto"
        )
    ranges = [[p.min[0], p.opt[0], p.max[0]] for p in inputs[like].profiles]
    return Tensor(name=name, dtype=trt.int32, shape=[-1], dim_range=OrderedDict([(dimension, ranges)]))


class SawAttention(Module):
    """What stands in an ``Attention``'s place: its projections and norms, and the plugins between them.

    Parameters
    ----------
    attention : tensorrt_llm.layers.attention.Attention
        One that :func:`saw_trtllm.backends.tensorrt_llm.checks.check_attention` lets pass.
    layer_idx : int
        Number of the layer in the whole model.
    options : SwapOptions
    norm_epsilon : float, optional
        Of the q/k norm. TensorRT-LLM's definitions leave it at 1e-5, whatever the checkpoint says.
    """

    def __init__(self, attention: Attention, layer_idx: int, options: SwapOptions, norm_epsilon: float | None = None):
        super().__init__()
        self.qkv, self.dense = attention.qkv, attention.dense
        # Row-wise FP8 takes its input with a scale for each token.
        self.is_row_wise = isinstance(attention, Fp8RowwiseAttention)
        self.clamp_val = attention.clamp_val if self.is_row_wise else None
        self.qk_layernorm = getattr(attention, "qk_layernorm", False)
        if self.qk_layernorm:
            self.q_layernorm, self.k_layernorm = attention.q_layernorm, attention.k_layernorm
            if norm_epsilon is not None:
                self.q_layernorm.eps = self.k_layernorm.eps = norm_epsilon
        self.num_attention_heads = attention.num_attention_heads
        self.num_attention_kv_heads = attention.num_attention_kv_heads
        self.attention_head_size = attention.attention_head_size
        self.local_layer_idx = attention.local_layer_idx
        self.q_scaling, self.softcap = attention.q_scaling, getattr(attention, "max_attn_value", 0.0)
        self.is_local = getattr(attention, "is_local", False)
        self.tp_size, self.tp_rank = attention.tp_size, attention.tp_rank
        self.layer_idx = layer_idx
        self.options = options

    def forward(
        self,
        hidden_states: Tensor,
        use_cache: bool = False,
        attention_params: Any = None,
        lora_layer_params: Any = None,
        all_reduce_params: Any = None,
        **others: Any,
    ) -> tuple[Tensor, None]:
        """As ``Attention.forward`` with a paged cache; its parameters for what SAW does not have must be unset."""
        for name in ("encoder_output", "spec_decoding_params", "mrope_params", "attention_mask", "skip_attn"):
            if others.get(name) is not None:
                raise ConfigError(f"attention with {name} is not supported with a SAW cache: build without it")
        if lora_layer_params is not None or not use_cache:
            raise ConfigError("a SAW cache needs --kv_cache_type paged and has no LoRA: build without --lora_plugin")
        qkv = self.qkv(hidden_states)
        if self.qk_layernorm:
            qkv = self._normalize(qkv)
        local = "_local" if self.is_local else ""
        cos_sin = getattr(attention_params, f"embed_positions_for_gpt_attention{local}")
        context = saw_attention(qkv, cos_sin, self.layer, self.options)
        if self.is_row_wise:
            context = quantize_fp8_per_token(context, None if self.clamp_val is None else self.clamp_val.value)
        return self.dense(context, all_reduce_params=all_reduce_params), None

    @property
    def layer(self) -> Layer:
        """The layer as it is on this rank."""
        return Layer(
            self.local_layer_idx,
            self.num_attention_heads,
            self.num_attention_kv_heads,
            self.attention_head_size,
            self.q_scaling,
            self.softcap,
            self.options.window(self.layer_idx),
            **self.options.local_constants(self.layer_idx, self.tp_size, self.tp_rank),
        )

    def _normalize(self, qkv: Tensor) -> Tensor:
        """RMSNorm over each head of Q and K."""
        D = self.attention_head_size
        heads = (self.num_attention_heads, self.num_attention_kv_heads)
        q, k, v = split(qkv, [heads[0] * D, heads[1] * D, heads[1] * D], dim=1)
        normalized = [
            norm(x.view(concat([shape(x, 0), n, D]))).view(concat([shape(x, 0), n * D]))
            for x, n, norm in zip((q, k), heads, (self.q_layernorm, self.k_layernorm), strict=True)
        ]
        return concat([*normalized, v], dim=1)
