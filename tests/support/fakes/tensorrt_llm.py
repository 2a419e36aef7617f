"""A small stand-in for TensorRT-LLM's front-end: the names and signatures that the swap builds on, and nothing else.

Its model is an embedding, layers of attention with a residual, and a head. ``test_trtllm_frontend.py`` compares the
signatures with those of TensorRT-LLM's own source.
"""

from __future__ import annotations

import contextlib
import copy
import enum
import inspect
import json
import os
import sys
import types
from collections import OrderedDict
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch

from tests.support.fakes import tensorrt as trt
from tests.support.fakes import tensorrt_frontend as fake_tensorrt_frontend

_DTYPES = {"float16": trt.float16, "bfloat16": trt.bfloat16, "float32": trt.float32}


class _State:
    net = None


def default_net():
    return _State.net


def default_trtnet():
    return _State.net.trt_network


# functional


class Tensor:
    def __init__(self, name=None, dtype=None, shape=None, dim_range=None, is_network_input=True, trt_tensor=None):
        self.profiles = []
        self.trt_tensor = trt_tensor
        if is_network_input:
            for profile in range(len(next(iter(dim_range.values())))):
                sizes = [[r[profile]] * 3 if isinstance(r[profile], int) else r[profile] for r in dim_range.values()]
                low, opt, high = zip(*sizes, strict=True)
                self.profiles.append(types.SimpleNamespace(min=list(low), opt=list(opt), max=list(high)))
            self.trt_tensor = default_trtnet().add_input(name=name, dtype=dtype, shape=shape)
            default_net()._inputs[name] = self

    name = property(lambda self: self.trt_tensor.name)
    dtype = property(lambda self: self.trt_tensor.dtype)
    shape = property(lambda self: self.trt_tensor.shape)

    def view(self, dims):
        layer = default_trtnet().add_shuffle(self.trt_tensor)
        if isinstance(dims, Tensor):
            layer.set_input(1, dims.trt_tensor)
        else:
            layer.reshape_dims = tuple(dims)
        return _create_tensor(layer.get_output(0), layer)

    def __add__(self, other):
        layer = default_trtnet().add_elementwise(self.trt_tensor, other.trt_tensor, trt.ElementWiseOperation.SUM)
        return _create_tensor(layer.get_output(0), layer)


def _create_tensor(trt_tensor, producer):
    if _Recording.current is not None:
        _Recording.current.layer_name = producer.name
    return Tensor(is_network_input=False, trt_tensor=trt_tensor)


def constant(array):
    default_net().arrays.append(array)
    dtype = next(k for k, v in trt.NUMPY.items() if np.dtype(v) == array.dtype)
    layer = default_trtnet().add_constant(array.shape, trt.Weights(dtype, array.ctypes.data, array.size))
    return _create_tensor(layer.get_output(0), layer)


def cast(input, dtype):
    if input.dtype == dtype:
        return input
    layer = default_trtnet().add_cast(input.trt_tensor, dtype)
    return _create_tensor(layer.get_output(0), layer)


def matmul(a, b, transb=False):
    ops = (trt.MatrixOperation.NONE, trt.MatrixOperation.TRANSPOSE if transb else trt.MatrixOperation.NONE)
    layer = default_trtnet().add_matrix_multiply(a.trt_tensor, ops[0], b.trt_tensor, ops[1])
    return _create_tensor(layer.get_output(0), layer)


def shape(tensor, dim):
    layer = default_trtnet().add_shape(tensor.trt_tensor)
    index = constant(np.array([dim], np.int32))
    layer = default_trtnet().add_gather_v2(layer.get_output(0), index.trt_tensor, trt.GatherMode.ELEMENT)
    return _create_tensor(layer.get_output(0), layer).view([])


def concat(inputs, dim=0):
    tensors = [constant(np.array([t], np.int64)) if isinstance(t, int) else t for t in inputs]
    tensors = [t.view([1]) if len(t.shape) == 0 else t for t in tensors]
    layer = default_trtnet().add_concatenation([t.trt_tensor for t in tensors])
    layer.axis = dim
    return _create_tensor(layer.get_output(0), layer)


def split(tensor, split_size_or_sections, dim=0):
    parts, start = [], 0
    for size in split_size_or_sections:
        sizes = [shape(tensor, i) if i != dim else size for i in range(len(tensor.shape))]
        layer = default_trtnet().add_slice(tensor.trt_tensor, [0, 0], [1, 1], [1, 1])
        layer.set_input(1, constant(np.array([0, start], np.int64)).trt_tensor)
        layer.set_input(2, concat(sizes).trt_tensor)
        parts.append(_create_tensor(layer.get_output(0), layer))
        start += size
    return parts


PositionEmbeddingType = enum.Enum("PositionEmbeddingType", "learned_absolute rope_gptj rope_gpt_neox alibi")
AttentionMaskType = enum.Enum("AttentionMaskType", "padding causal bidirectional")


class _Recording:
    current = None

    def __init__(self, call):
        self.layer_kind, self.raw_inputs, self.layer_name, self.raw_outputs = "gpt_attention", call, "", None

    def replace_outputs_uses_with(self, net, new_outputs):
        assert type(self.raw_outputs) is type(new_outputs)
        (old, _), (new, _) = self.raw_outputs, new_outputs
        for layer in net.trt_network._layers:
            for i, tensor in enumerate(layer._inputs):
                if tensor is old.trt_tensor:
                    layer.set_input(i, new.trt_tensor)


def gpt_attention(
    *,
    qkv,
    sequence_length,
    host_past_key_value_lengths,
    host_max_attention_window_sizes,
    host_sink_token_length,
    context_lengths,
    cache_indirection,
    host_request_types,
    layer_idx,
    num_heads,
    num_kv_heads,
    hidden_size_per_head,
    q_scaling,
    attn_logit_softcapping_scale=0.0,
    rotary_embedding_dim=0,
    position_embedding_type=PositionEmbeddingType.learned_absolute,
    rotary_cos_sin=None,
    kv_cache_block_offsets=None,
    host_kv_cache_block_offsets=None,
    host_kv_cache_pool_pointers=None,
    host_kv_cache_pool_mapping=None,
    host_context_lengths=None,
    host_runtime_perf_knobs=None,
    host_context_progress=None,
    mask_type=AttentionMaskType.causal,
    use_cache=True,
    do_cross_attention=False,
    is_mla_enabled_flag=False,
    attention_mask=None,
    attention_packed_mask=None,
    alibi_slopes=None,
    relative_attention_bias=None,
    logn_scaling=None,
    qkv_bias=None,
    spec_decoding_packed_mask=None,
    long_rope_rotary_cos_sin=None,
    mrope_rotary_cos_sin=None,
    skip_attn=None,
    kv_orig_quant_scale=None,
    attention_output_orig_quant_scale=None,
):
    record = _Recording(dict(locals()))
    creator = trt.get_plugin_registry().get_plugin_creator("GPTAttention", "1", "tensorrt_llm")
    fields = {"num_heads": num_heads, "head_size": hidden_size_per_head}
    fields = [trt.PluginField(k, np.array(v, np.int32), trt.PluginFieldType.INT32) for k, v in fields.items()]
    plugin = creator.create_plugin("causal_attn", trt.PluginFieldCollection(fields))
    inputs = [
        *(qkv, sequence_length, host_past_key_value_lengths, host_max_attention_window_sizes, host_sink_token_length),
        *(context_lengths, cache_indirection, host_request_types, kv_cache_block_offsets, host_kv_cache_block_offsets),
        *(host_kv_cache_pool_pointers, host_kv_cache_pool_mapping, rotary_cos_sin, host_context_lengths),
        *(host_runtime_perf_knobs, host_context_progress),
    ]
    layer = default_trtnet().add_plugin_v2([t.trt_tensor for t in inputs], plugin)
    _Recording.current = record
    output = _create_tensor(layer.get_output(0), layer)
    _Recording.current = None
    record.raw_outputs = (output, None)
    default_net().recorded[record.layer_name] = record
    return output, None


# module, parameter, layers


class Module:
    def __init__(self):
        self._modules, self._parameters = {}, {}

    def __call__(self, *args, **kwargs):
        return self.forward(*args, **kwargs)

    def __getattr__(self, name):
        for kind in ("_parameters", "_modules"):
            if name in self.__dict__.get(kind, {}):
                return self.__dict__[kind][name]
        raise AttributeError(name)

    def __setattr__(self, name, value):
        if isinstance(value, Module):
            self._modules[name] = value
        elif isinstance(value, Parameter):
            self._parameters[name] = value
        else:
            super().__setattr__(name, value)

    def named_modules_with_parent(self, prefix="", parent=None):
        yield prefix, self, parent
        for name, child in list(self._modules.items()):
            yield from child.named_modules_with_parent(f"{prefix}.{name}" if prefix else name, self)

    def named_parameters(self):
        for prefix, module, _ in self.named_modules_with_parent():
            for name, parameter in module._parameters.items():
                yield f"{prefix}.{name}" if prefix else name, parameter


class ModuleList(Module):
    def __init__(self, modules):
        super().__init__()
        for i, module in enumerate(modules):
            setattr(self, str(i), module)


class Parameter:
    def __init__(self, value=None, shape=None, dtype=None):
        self.shape, self.array = shape, value

    @property
    def value(self):
        return constant(self.array)

    @value.setter
    def value(self, array):
        assert tuple(array.shape) == tuple(self.shape), (array.shape, self.shape)
        self.array = np.ascontiguousarray(array)


class ColumnLinear(Module):
    def __init__(self, in_features, out_features, bias=False, dtype=None, tp_size=1):
        super().__init__()
        self.weight = Parameter(shape=(out_features // tp_size, in_features), dtype=dtype)
        self.has_bias = bias
        if bias:
            self.bias = Parameter(shape=(out_features // tp_size,), dtype=dtype)

    def forward(self, x, lora_runtime_params=None):
        y = matmul(x, self.weight.value, transb=True)
        return y + self.bias.value.view([1, -1]) if self.has_bias else y


class RowLinear(ColumnLinear):
    def __init__(self, in_features, out_features, bias=False, dtype=None, tp_size=1):
        Module.__init__(self)
        self.has_bias = False
        self.weight = Parameter(shape=(out_features, in_features // tp_size), dtype=dtype)

    def forward(self, x, lora_runtime_params=None, all_reduce_params=None):
        return super().forward(x)


class RmsNorm(Module):
    def __init__(self, normalized_shape, eps=1e-06, dtype=None):
        super().__init__()
        self.weight, self.eps = Parameter(shape=(normalized_shape,), dtype=dtype), eps

    def forward(self, x, normalized_shape=None):
        layer = default_trtnet().add_identity(x.trt_tensor)
        layer.eps = self.eps
        return _create_tensor(layer.get_output(0), layer)


class Attention(Module):
    def __init__(
        self,
        *,
        local_layer_idx,
        hidden_size,
        num_attention_heads,
        num_kv_heads=None,
        attention_head_size=None,
        qk_layernorm=False,
        eps=1e-05,
        attention_mask_type=AttentionMaskType.padding,
        bias=True,
        dtype=None,
        position_embedding_type=PositionEmbeddingType.learned_absolute,
        rotary_embedding_percentage=1.0,
        tp_size=1,
        tp_rank=0,
        q_scaling=1.0,
        cross_attention=False,
        clip_qkv=None,
        max_attn_value=0.0,
    ):
        super().__init__()
        D = self.attention_head_size = attention_head_size
        self.local_layer_idx = local_layer_idx
        self.num_attention_heads = num_attention_heads // tp_size
        self.num_attention_kv_heads = (num_kv_heads + tp_size - 1) // tp_size
        self.tp_size, self.tp_rank, self.q_scaling, self.max_attn_value = tp_size, tp_rank, q_scaling, max_attn_value
        self.cross_attention, self.clip_qkv, self.attention_mask_type = cross_attention, clip_qkv, attention_mask_type
        self.position_embedding_type = position_embedding_type
        self.rotary_embedding_dim = int(D * rotary_embedding_percentage)
        self.relative_attention = self.use_logn_scaling = False
        self.inner_layernorm = None
        rows = tp_size * (self.num_attention_heads + 2 * self.num_attention_kv_heads) * D
        self.qkv = ColumnLinear(hidden_size, rows, bias=bias, dtype=dtype, tp_size=tp_size)
        self.dense = RowLinear(num_attention_heads * D, hidden_size, dtype=dtype, tp_size=tp_size)
        self.qk_layernorm, self.layernorm_share = qk_layernorm, True
        if qk_layernorm:
            self.q_layernorm, self.k_layernorm = (RmsNorm(D, eps=eps, dtype=dtype) for _ in "qk")

    def forward(self, hidden_states, use_cache=False, kv_cache_params=None, attention_params=None, **others):
        a, c = attention_params, kv_cache_params
        context, present = gpt_attention(
            qkv=self.qkv(hidden_states),
            sequence_length=a.sequence_length,
            context_lengths=a.context_lengths,
            host_context_lengths=a.host_context_lengths,
            host_request_types=a.host_request_types,
            host_runtime_perf_knobs=a.host_runtime_perf_knobs,
            host_context_progress=a.host_context_progress,
            layer_idx=self.local_layer_idx,
            num_heads=self.num_attention_heads,
            num_kv_heads=self.num_attention_kv_heads,
            hidden_size_per_head=self.attention_head_size,
            q_scaling=self.q_scaling,
            attn_logit_softcapping_scale=self.max_attn_value,
            rotary_embedding_dim=self.rotary_embedding_dim,
            position_embedding_type=self.position_embedding_type,
            rotary_cos_sin=a.embed_positions_for_gpt_attention,
            mask_type=self.attention_mask_type,
            **vars(c),
        )
        return self.dense(context), present


# mapping, models


class Mapping:
    def __init__(self, world_size=1, tp_size=1, pp_size=1, rank=0, **others):
        self.world_size, self.tp_size, self.pp_size, self.rank, self.cp_size = world_size, tp_size, pp_size, rank, 1

    @property
    def tp_rank(self):
        return self.rank % self.tp_size

    def pp_layers(self, num_layers):
        count, pp_rank = num_layers // self.pp_size, self.rank // self.tp_size
        return list(range(pp_rank * count, (pp_rank + 1) * count))

    def to_dict(self):
        return {k: v for k, v in vars(self).items() if k != "rank"}


class PretrainedConfig:
    def __init__(self, *, mapping=None, quantization=None, **others):
        self.mapping = Mapping(**mapping or {})
        self.quantization = types.SimpleNamespace(
            **{"quant_algo": None, "kv_cache_quant_algo": None} | (quantization or {})
        )
        vars(self).update(others)

    @classmethod
    def from_dict(cls, config):
        known = {"LlamaForCausalLM": LLaMAConfig, "MistralForCausalLM": LLaMAConfig}
        return known.get(config["architecture"], QWenConfig)(**config)

    @classmethod
    def from_json_file(cls, config_file):
        return cls.from_dict(json.loads(Path(config_file).read_text()))

    def set_rank(self, rank):
        self.mapping.rank = rank

    def to_dict(self):
        config = copy.deepcopy(vars(self))
        return config | {"mapping": self.mapping.to_dict(), "quantization": vars(self.quantization).copy()}


class LLaMAConfig(PretrainedConfig):
    pass


class QWenConfig(PretrainedConfig):
    pass


class _DecoderLayer(Module):
    def __init__(self, config, layer_idx):
        super().__init__()
        m = config.mapping
        self.attention = Attention(
            local_layer_idx=layer_idx - m.pp_layers(config.num_hidden_layers)[0],
            hidden_size=config.hidden_size,
            attention_head_size=config.head_size,
            num_attention_heads=config.num_attention_heads,
            num_kv_heads=config.num_key_value_heads,
            dtype=config.dtype,
            attention_mask_type=AttentionMaskType.causal,
            bias=config.attn_bias,
            position_embedding_type=PositionEmbeddingType.rope_gpt_neox,
            qk_layernorm=getattr(config, "qwen_type", "") == "qwen3",
            tp_size=m.tp_size,
            tp_rank=m.tp_rank,
        )


class _PostInit(type):
    def __call__(cls, *args, **kwargs):
        obj = type.__call__(cls, *args, **kwargs)
        obj.__post_init__()
        return obj


class PretrainedModel(Module, metaclass=_PostInit):
    def __init__(self, config):
        super().__init__()
        self.config = config

    def __post_init__(self):
        pass

    def load(self, weights, from_pruned=False):
        for name, parameter in self.named_parameters():
            parameter.value = weights[name].numpy()

    def prepare_inputs(
        self,
        max_batch_size,
        max_input_len,
        max_seq_len,
        max_num_tokens,
        use_cache,
        max_beam_width=1,
        max_draft_len=0,
        gather_context_logits=False,
        speculative_decoding_draft_tokens_external=False,
        lora_target_modules=None,
    ):
        B, T = [[1, max_batch_size, max_batch_size]], [[1, 64, max_num_tokens]]
        pools, blocks, L = [[1, 1, 2]], [[1, 2, 4]], [self.config.num_hidden_layers]

        def declare(name, dtype, **dims):
            """Each dimension: a size, or [low, usual, high], for the only profile."""
            sizes = [r[0] if isinstance(r[0], int) else -1 for r in dims.values()]
            return Tensor(name=name, dtype=dtype, shape=sizes, dim_range=OrderedDict(dims))

        i32, i64 = trt.int32, trt.int64
        offsets = {"pools": pools, "batch": B, "kv": [2], "blocks": blocks}
        cache = {
            "kv_cache_block_offsets": declare("kv_cache_block_offsets", i32, **offsets),
            "host_kv_cache_block_offsets": declare("host_kv_cache_block_offsets", i32, **offsets),
            "host_kv_cache_pool_pointers": declare("host_kv_cache_pool_pointers", i64, pools=pools, two=[2]),
            "host_kv_cache_pool_mapping": declare("host_kv_cache_pool_mapping", i32, layers=L, two=[2]),
            "host_max_attention_window_sizes": declare("host_max_attention_window_sizes", i32, layers=L),
            "host_sink_token_length": declare("host_sink_token_length", i32, one=[1]),
            "host_past_key_value_lengths": declare("host_past_key_value_lengths", i32, batch=B),
            "cache_indirection": declare("cache_indirection", i32, batch=B, beam=[[1, 1, 1]], len=T),
        }
        attention = {
            name: declare(name, i32, batch=B)
            for name in ("sequence_length", "context_lengths", "host_context_lengths", "host_request_types")
        }
        attention["host_runtime_perf_knobs"] = declare("host_runtime_perf_knobs", i64, knobs=[16])
        attention["host_context_progress"] = declare("host_context_progress", i64, one=[1])
        last = None if gather_context_logits else declare("last_token_ids", i32, batch_size_last_token_ids=B)
        return {
            "input_ids": declare("input_ids", i32, num_tokens=T),
            "position_ids": declare("position_ids", i32, position_ids_num_tokens_range=T),
            "use_cache": use_cache,
            "last_token_ids": last,
            "kv_cache_params": types.SimpleNamespace(**cache),
            "attention_params": types.SimpleNamespace(**attention),
        }


class _ForCausalLM(PretrainedModel):
    def __init__(self, config):
        super().__init__(config)
        self.transformer = Module()
        embedding = Module()
        embedding.weight = Parameter(shape=(config.vocab_size, config.hidden_size), dtype=config.dtype)
        self.transformer.vocab_embedding = embedding
        layers = config.mapping.pp_layers(config.num_hidden_layers)
        self.transformer.layers = ModuleList([_DecoderLayer(config, i) for i in layers])
        self.lm_head = ColumnLinear(config.hidden_size, config.vocab_size, dtype=config.dtype)
        size = config.max_position_embeddings * config.head_size
        self.table = np.zeros((1, size), np.float32)

    def load(self, weights, from_pruned=False):
        rows = weights["lm_head.weight"].shape[0]
        self.lm_head.weight.shape = (rows, self.config.hidden_size)
        super().load(weights)

    def forward(self, input_ids, position_ids=None, use_cache=False, attention_params=None, **others):
        attention_params.embed_positions_for_gpt_attention = constant(self.table)
        table = self.transformer.vocab_embedding.weight.value
        layer = default_trtnet().add_gather(table.trt_tensor, input_ids.trt_tensor, 0)
        x = _create_tensor(layer.get_output(0), layer)
        last_token_ids = others.pop("last_token_ids")
        for decoder in self.transformer.layers._modules.values():
            y, present = decoder.attention(x, use_cache=use_cache, attention_params=attention_params, **others)
            assert present is None
            x = x + y
        if last_token_ids is not None:
            layer = default_trtnet().add_gather(x.trt_tensor, last_token_ids.trt_tensor, 0)
            x = _create_tensor(layer.get_output(0), layer)
        logits = self.lm_head(x)
        default_trtnet().mark_output(logits.trt_tensor)
        logits.trt_tensor.name = "logits"


class LLaMAForCausalLM(_ForCausalLM):
    config_class = LLaMAConfig


class QWenForCausalLM(_ForCausalLM):
    config_class = QWenConfig


class GemmaForCausalLM(_ForCausalLM):
    """Named only: what is Gemma's own is tried on the real definition."""


# network, graph_rewriting, plugin, builder


class Network:
    def __init__(self, trt_network, plugin_config):
        self.trt_network, self.plugin_config = trt_network, plugin_config
        self._inputs, self.recorded, self.removed, self.arrays = {}, {}, set(), []

    def get_inputs(self):
        return self._inputs.values()


@contextlib.contextmanager
def net_guard(network):
    before, _State.net = _State.net, network
    yield
    _State.net = before


class Layer:
    def __init__(self, network, trt_layer):
        self.network, self.trt_layer = network, trt_layer

    name = property(lambda self: self.trt_layer.name)

    def mark_as_removed(self):
        self.network.removed.add(self.name)


class FLayerInfoMemo:
    @staticmethod
    def instance():
        return types.SimpleNamespace(get=default_net().recorded.get)


class PatternRewriter:
    def __init__(self, name, root_layer=None, separate_match_rewrite=False):
        self.name = name


class RewritePatternManager:
    def __init__(self):
        self.patterns = {}

    def add(self, label, pattern, benefit=0):
        self.patterns[label] = pattern

    def rewrite(self, net, args=None):
        modified = True
        while modified:
            modified = False
            for layer in [Layer(net, x) for x in net.trt_network._layers]:
                if layer.name not in net.removed:
                    modified |= any([p.match_and_rewrite(layer) for p in self.patterns.values()])


def preprocess_weights(weights, model_config):
    raise NotImplementedError("quantized layers are TensorRT-LLM's own")


def quantize_fp8_per_token(x, clamp_val=None):
    raise NotImplementedError("quantized layers are TensorRT-LLM's own")


class Fp8RowwiseAttention(Module):
    """No model here has one."""


class PluginConfig:
    def __init__(self, tokens_per_block=32, use_paged_context_fmha=True, **others):
        self.dtype, self.gpt_attention_plugin, self.lora_plugin = "float16", "auto", None
        self.tokens_per_block, self.use_paged_context_fmha = tokens_per_block, use_paged_context_fmha
        self.remove_input_padding = self.paged_kv_cache = self.context_fmha = True
        self.use_fp8_context_fmha = False
        vars(self).update(others)


class BuildConfig:
    def __init__(self, max_batch_size=2048, max_seq_len=None, max_num_tokens=8192, plugin_config=None, **others):
        self.max_batch_size, self.max_seq_len, self.max_num_tokens = max_batch_size, max_seq_len, max_num_tokens
        self.max_input_len, self.max_beam_width, self.max_draft_len = 1024, 1, 0
        self.kv_cache_type, self.gather_context_logits, self.speculative_decoding_mode = "paged", False, 1
        self.lora_config, self.plugin_config = {}, plugin_config or PluginConfig()
        vars(self).update(others)


class Engine:
    def __init__(self, config, build_config, engine):
        self.config, self.build_config, self.engine = config, build_config, engine

    def save(self, engine_dir):
        os.makedirs(engine_dir, exist_ok=True)
        if self.config.mapping.rank == 0:
            limits = vars(self.build_config) | {"plugin_config": vars(self.build_config.plugin_config)}
            config = {"version": "1.2.1", "pretrained_config": self.config.to_dict(), "build_config": limits}
            (Path(engine_dir) / "config.json").write_text(json.dumps(config))
        (Path(engine_dir) / f"rank{self.config.mapping.rank}.engine").write_bytes(self.engine)


def build(model, build_config):
    builder = trt.Builder(None)
    network = Network(builder.create_network(2), build_config.plugin_config)
    names = ("max_batch_size", "max_input_len", "max_seq_len", "max_num_tokens", "max_beam_width", "max_draft_len")
    with net_guard(network):
        limits = {name: getattr(build_config, name) for name in (*names, "gather_context_logits")}
        inputs = model.prepare_inputs(use_cache=True, **limits)
        model.forward(**inputs)
    config = builder.create_builder_config()
    profile = builder.create_optimization_profile()
    for name, tensor in network._inputs.items():
        profile.set_shape(name, *(getattr(tensor.profiles[0], k) for k in ("min", "opt", "max")))
    config.add_optimization_profile(profile)
    network.trt_network.arrays = network.arrays
    return Engine(model.config, build_config, builder.build_serialized_network(network.trt_network, config))


_MODULES = {
    "_common": (default_net, default_trtnet),
    "functional": (
        *(Tensor, _create_tensor, cast, concat, constant, matmul, shape, split, gpt_attention),
        *(PositionEmbeddingType, AttentionMaskType),
    ),
    "module": (Module, ModuleList),
    "mapping": (Mapping,),
    "models": (PretrainedModel, PretrainedConfig, GemmaForCausalLM, LLaMAForCausalLM, QWenForCausalLM),
    "models.modeling_utils": (preprocess_weights,),
    "network": (Network, net_guard),
    "quantization": (),
    "quantization.functional": (quantize_fp8_per_token,),
    "quantization.layers": (Fp8RowwiseAttention,),
    "graph_rewriting": (FLayerInfoMemo, PatternRewriter, RewritePatternManager, Layer),
    "layers": (),
    "layers.attention": (Attention, gpt_attention),
    "plugin": (PluginConfig,),
    "builder": (BuildConfig, build),
}
#: Parameters of what the swap calls or takes apart, by module and name.
SIGNATURES = {
    ("functional", "gpt_attention"): inspect.signature(gpt_attention),
    ("functional", "split"): inspect.signature(split),
    ("functional", "concat"): inspect.signature(concat),
    ("functional", "cast"): inspect.signature(cast),
    ("functional", "_create_tensor"): inspect.signature(_create_tensor),
    ("layers.attention", "Attention"): inspect.signature(Attention.__init__),
    ("models", "PretrainedModel.prepare_inputs"): inspect.signature(PretrainedModel.prepare_inputs),
    ("models", "PretrainedModel.load"): inspect.signature(PretrainedModel.load),
    ("models.modeling_utils", "preprocess_weights"): inspect.signature(preprocess_weights),
    ("quantization.functional", "quantize_fp8_per_token"): inspect.signature(quantize_fp8_per_token),
    ("graph_rewriting", "PatternRewriter"): inspect.signature(PatternRewriter.__init__),
    ("graph_rewriting", "RewritePatternManager.add"): inspect.signature(RewritePatternManager.add),
    ("graph_rewriting", "RewritePatternManager.rewrite"): inspect.signature(RewritePatternManager.rewrite),
    ("builder", "build"): inspect.signature(build),
}


@contextlib.contextmanager
def frontend() -> Iterator[types.SimpleNamespace]:
    """The stand-in in TensorRT-LLM's place, over :mod:`tests.support.fakes.tensorrt`."""
    with pytest.MonkeyPatch.context() as patch:
        fake_tensorrt_frontend.forget()
        trt.install(patch)
        trt.get_plugin_registry().saw = True
        patch.setattr(torch.cuda, "is_available", lambda: False)
        package = types.ModuleType("tensorrt_llm")
        package.__path__, package.__version__ = [], "1.2.1"
        patch.setitem(sys.modules, "tensorrt_llm", package)
        for name, members in _MODULES.items():
            module = types.ModuleType(f"tensorrt_llm.{name}")
            module.__path__ = []
            for member in members:
                setattr(module, member.__name__, member)
            patch.setitem(sys.modules, module.__name__, module)
        yield types.SimpleNamespace(trt=trt, build=build)
        fake_tensorrt_frontend.forget()
