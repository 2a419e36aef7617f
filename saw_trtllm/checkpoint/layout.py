"""TensorRT-LLM's tensors: which ones a model has, their shapes, and how tensor parallelism splits them.

Linear weights are ``[out_features, in_features]``. Rank r of n has a contiguous n-th of the query heads, of the MLP's
inner features and of the (padded) vocabulary; norms are whole on every rank, and so is the embedding of a checkpoint.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from saw_trtllm.errors import ConfigError
from saw_trtllm.model.config import ModelConfig
from saw_trtllm.model.quantization import QuantizedWeight, WeightFormat

EMBEDDING = "transformer.vocab_embedding.weight"
FINAL_NORM = "transformer.ln_f.weight"
LM_HEAD = "lm_head.weight"

_SPLIT_DIMS = {
    "attention.dense.weight": 1,
    "mlp.fc.weight": 0,
    "mlp.gate.weight": 0,
    "mlp.proj.weight": 1,
    LM_HEAD: 0,
}
_QKV = ("attention.qkv.weight", "attention.qkv.bias")
_NORM = re.compile(r"(layernorm|ln_f)\.weight$")


def layer_prefix(layer: int) -> str:
    """Begin the names of a layer's tensors."""
    return f"transformer.layers.{layer}."


def layer_shapes(config: ModelConfig) -> dict[str, tuple[int, ...]]:
    """Shapes of one layer's tensors by name without :func:`layer_prefix`."""
    hidden, inner, D = config.hidden_size, config.intermediate_size, config.head_size
    q_rows = config.num_attention_heads * D
    qkv_rows = q_rows + 2 * config.num_key_value_heads * D
    shapes: dict[str, tuple[int, ...]] = {
        "input_layernorm.weight": (hidden,),
        "attention.qkv.weight": (qkv_rows, hidden),
    }
    if config.attn_bias:
        shapes["attention.qkv.bias"] = (qkv_rows,)
    if config.qk_layernorm:
        shapes["attention.q_layernorm.weight"] = (D,)
        shapes["attention.k_layernorm.weight"] = (D,)
    shapes |= {
        "attention.dense.weight": (hidden, q_rows),
        "post_layernorm.weight": (hidden,),
        "mlp.fc.weight": (inner, hidden),
        "mlp.gate.weight": (inner, hidden),
        "mlp.proj.weight": (hidden, inner),
    }
    if config.inter_layernorms:
        shapes["pre_feedforward_layernorm.weight"] = (hidden,)
        shapes["post_feedforward_layernorm.weight"] = (hidden,)
    return shapes


def is_linear(name: str) -> bool:
    """Whether a tensor is the weight of a linear layer."""
    return name.endswith(".weight") and not is_norm(name) and name != EMBEDDING


def is_norm(name: str) -> bool:
    """Whether a tensor is the weight of a norm."""
    return _NORM.search(name) is not None


def expected_shapes(config: ModelConfig) -> dict[str, tuple[int, ...]]:
    """Every tensor of the unsharded model by name, in order: embedding, layers, final norm, ``lm_head``."""
    shapes: dict[str, tuple[int, ...]] = {EMBEDDING: (config.vocab_size, config.hidden_size)}
    per_layer = layer_shapes(config)
    for i in range(config.num_hidden_layers):
        shapes |= {layer_prefix(i) + name: shape for name, shape in per_layer.items()}
    return shapes | {FINAL_NORM: (config.hidden_size,), LM_HEAD: (config.vocab_size, config.hidden_size)}


def check_tp_size(config: ModelConfig, tp_size: int) -> None:
    """Reject a tensor-parallel size that does not split this model evenly."""
    if tp_size < 1:
        raise ConfigError(f"tp_size is {tp_size}, but at least 1 is needed")
    for key, value in (
        ("num_attention_heads", config.num_attention_heads),
        ("intermediate_size", config.intermediate_size),
    ):
        if value % tp_size:
            raise ConfigError(f"tp_size {tp_size} does not divide {key} {value}: choose one that does")
    heads = config.num_key_value_heads
    if heads % tp_size and tp_size % heads:
        raise ConfigError(
            f"tp_size {tp_size} neither divides nor is a multiple of num_key_value_heads {heads}: choose one that is"
        )


def shard_shape(name: str, config: ModelConfig, tp_size: int) -> tuple[int, ...]:
    """Shape of one rank's part of the tensor ``name``."""
    kind = _kind(name)
    shape = list(expected_shapes(config)[name] if kind == name else layer_shapes(config)[kind])
    if kind in _QKV:
        heads = config.num_attention_heads // tp_size + 2 * max(1, config.num_key_value_heads // tp_size)
        shape[0] = heads * config.head_size
    else:
        dim = _split_dim(kind, config)
        if dim is not None:
            shape[dim] = -(-shape[dim] // tp_size)
    return tuple(shape)


def shard(name: str, array: np.ndarray, config: ModelConfig, tp_size: int, rank: int) -> np.ndarray:
    """Cut out one rank's part of a tensor.

    Parameters
    ----------
    name : str
        TensorRT-LLM's name of the tensor.
    array : np.ndarray
        The whole tensor, of :func:`expected_shapes`'s shape and any dtype.
    config : ModelConfig
        The whole model's.
    tp_size, rank : int
        Number of ranks, and which one.

    Returns
    -------
    np.ndarray
        Of :func:`shard_shape`'s shape and the same dtype; a view where that is possible.
    """
    if tp_size == 1:
        return array
    kind = _kind(name)
    if kind in _QKV:
        return _shard_qkv(array, config, tp_size, rank)
    dim = _split_dim(kind, config)
    if dim is None:
        return array
    size = -(-array.shape[dim] // tp_size)
    part = array[rank * size : (rank + 1) * size] if dim == 0 else array[:, rank * size : (rank + 1) * size]
    # TensorRT-LLM pads lm_head with zero rows to a multiple of the ranks; only a vocabulary can need it.
    lacking = size - part.shape[dim]
    return np.concatenate([part, np.zeros((lacking, *part.shape[1:]), part.dtype)]) if lacking else part


def kv_heads_of_rank(num_kv_heads: int, tp_size: int, rank: int) -> slice:
    """The KV heads of a rank. With fewer heads than ranks, each goes to several in a row: those of its queries."""
    first = rank * num_kv_heads // tp_size
    return slice(first, first + max(1, num_kv_heads // tp_size))


def unshard(name: str, shards: Sequence[np.ndarray], config: ModelConfig) -> np.ndarray:
    """Put the parts of all ranks together again: the inverse of :func:`shard`."""
    if len(shards) == 1:
        return shards[0]
    kind = _kind(name)
    if kind in _QKV:
        return _unshard_qkv(shards, config)
    dim = _split_dim(kind, config)
    if dim is None:
        return shards[0]
    whole = np.concatenate(shards, axis=dim)
    return whole[: config.vocab_size] if kind in (LM_HEAD, EMBEDDING) else whole


def shard_format(name: str, format: WeightFormat, config: ModelConfig, tp_size: int) -> WeightFormat:
    """The format of each rank's part of a quantized weight: its groups stay whole.

    Raises
    ------
    ConfigError
        If the ranks' borders are not borders of its groups.
    """
    if tp_size == 1:
        return format
    inputs, columns = expected_shapes(config)[name][1], format.block[1]
    if _split_dim(_kind(name), config) != 1:
        return format.model_copy(update={"block": (1, columns)})
    part = inputs // tp_size
    if format.act_order or (columns < inputs and part % columns):
        what = "whose columns are in an order of their own" if format.act_order else f"in groups of {columns}"
        raise ConfigError(
            f"tp_size {tp_size} does not split the {inputs} inputs of {name!r}, {what}, between groups: choose one "
            "that does"
        )
    return format.model_copy(update={"block": (1, min(columns, part))})


def shard_weight(name: str, weight: QuantizedWeight, config: ModelConfig, tp_size: int, rank: int) -> QuantizedWeight:
    """:func:`shard` of a quantized weight; raises as :func:`shard_format`."""
    if tp_size == 1:
        return weight
    format, weight = shard_format(name, weight.format, config, tp_size), weight.by_row()
    along = _split_dim(_kind(name), config) == 1

    def part(x: np.ndarray) -> np.ndarray:
        return x if along and x.shape[1] == 1 else shard(name, x, config, tp_size, rank)

    values = shard(name, weight.values, config, tp_size, rank)
    factor = weight.pre_scale
    if along and factor is not None:
        factor = factor[rank * values.shape[1] : (rank + 1) * values.shape[1]]
    return replace(
        weight,
        format=format,
        values=values,
        scales=part(weight.scales),
        zeros=None if weight.zeros is None else part(weight.zeros),
        pre_scale=factor,
    )


def unshard_weight(name: str, shards: Sequence[QuantizedWeight], config: ModelConfig) -> QuantizedWeight:
    """The inverse of :func:`shard_weight`.

    Raises
    ------
    ValueError
        If ranks that share a scale, or an input's factor, have different ones.
    """
    if len(shards) == 1:
        return shards[0]
    along = _split_dim(_kind(name), config) == 1
    shared = along and shards[0].scales.shape[1] == 1
    if shared and not all(np.array_equal(s.scales, shards[0].scales) for s in shards):
        raise ValueError("scales")
    factors = [s.pre_scale for s in shards if s.pre_scale is not None]
    if not along and any(not np.array_equal(factor, factors[0]) for factor in factors):
        raise ValueError("pre_scale")

    def whole(parts: Sequence[np.ndarray]) -> np.ndarray:
        return parts[0] if shared else unshard(name, parts, config)

    values = unshard(name, [s.values for s in shards], config)
    columns = values.shape[1] if shared else shards[0].format.block[1]
    zeros = [s.zeros for s in shards if s.zeros is not None]
    return replace(
        shards[0],
        format=shards[0].format.model_copy(update={"block": (1, columns)}),
        values=values,
        scales=whole([s.scales for s in shards]),
        zeros=whole(zeros) if zeros else None,
        pre_scale=(np.concatenate(factors) if along else factors[0]) if factors else None,
    )


def _kind(name: str) -> str:
    """Strip the layer's number: ``mlp.fc.weight`` of ``transformer.layers.3.mlp.fc.weight``."""
    return name.split(".", 3)[3] if name.startswith("transformer.layers.") else name


def _split_dim(kind: str, config: ModelConfig) -> int | None:
    # A TensorRT-LLM checkpoint may come with a split embedding; save_checkpoint never writes one.
    extra = config.model_extra or {}
    if kind == EMBEDDING and extra.get("use_parallel_embedding"):
        return extra.get("embedding_sharding_dim", 0)
    return _SPLIT_DIMS.get(kind)


def _split_heads(array: np.ndarray, num_heads: int, num_kv_heads: int) -> tuple[np.ndarray, ...]:
    """View Q, K and V with a leading dimension of heads."""
    by_head = array.reshape(num_heads + 2 * num_kv_heads, -1, *array.shape[1:])
    return by_head[:num_heads], by_head[num_heads : num_heads + num_kv_heads], by_head[num_heads + num_kv_heads :]


def _shard_qkv(array: np.ndarray, config: ModelConfig, tp_size: int, rank: int) -> np.ndarray:
    heads, kv_heads = config.num_attention_heads, config.num_key_value_heads
    q, k, v = _split_heads(array, heads, kv_heads)
    n, kept = heads // tp_size, kv_heads_of_rank(kv_heads, tp_size, rank)
    parts = [q[rank * n : (rank + 1) * n], k[kept], v[kept]]
    return np.concatenate(parts).reshape(-1, *array.shape[1:])


def _unshard_qkv(shards: Sequence[np.ndarray], config: ModelConfig) -> np.ndarray:
    tp_size, kv_heads = len(shards), config.num_key_value_heads
    split = [_split_heads(s, config.num_attention_heads // tp_size, max(1, kv_heads // tp_size)) for s in shards]
    copies = max(1, tp_size // kv_heads)
    parts = [s[0] for s in split] + [s[1] for s in split[::copies]] + [s[2] for s in split[::copies]]
    return np.concatenate(parts).reshape(-1, *shards[0].shape[1:])
