"""What an engine's weights take in, so that nothing is left to do at run time: V's rotation, and the smoothing of keys.

Rotation: with B the block-diagonal Hadamard matrix (symmetric, its own inverse) the cache holds ``v B``, attention is
linear in V, so its output is ``o B``, and the output projection undoes it.

Smoothing: a RoPE pair's two channels turn together, so a factor on both commutes with RoPE. Keys divided by it and the
queries of the group multiplied by it leave every score as it was.
"""

from __future__ import annotations

import re

import numpy as np

from saw_trtllm.errors import ConfigError
from saw_trtllm.format import KVFormat, rotate
from saw_trtllm.model.config import ModelConfig

_QKV = re.compile(r"\.attention\.qkv\.(weight|bias)$")
_DENSE = re.compile(r"\.attention\.dense\.weight$")
_Q_NORM, _K_NORM = ".attention.q_layernorm.weight", ".attention.k_layernorm.weight"


def fold_v_rotation(name: str, tensor: np.ndarray, config: ModelConfig, kv_format: KVFormat) -> np.ndarray:
    """The tensor as an engine whose cache has ``rotate_v`` needs it.

    Parameters
    ----------
    name : str
        TensorRT-LLM's name. Only ``attention.qkv`` and ``attention.dense.weight`` change.
    tensor : numpy.ndarray
        The unsharded tensor.
    config : ModelConfig
    kv_format : KVFormat
        Of the tensor's layer.

    Returns
    -------
    numpy.ndarray
        fp32 where it was folded, for the caller to round once; else the tensor itself.
    """
    if not kv_format.rotate_v:
        return tensor
    order = kv_format.hadamard_order
    if _DENSE.search(name):
        return rotate(tensor, order)
    if _QKV.search(name):
        first = (config.num_attention_heads + config.num_key_value_heads) * config.head_size
        folded = tensor.astype(np.float32)
        folded[first:] = rotate(folded[first:].T, order).T
        return folded
    return tensor


def fold_smoothing(name: str, tensor: np.ndarray, config: ModelConfig, smoothing: np.ndarray) -> np.ndarray:
    """The tensor with keys divided, and queries multiplied, by a factor for each RoPE pair.

    Parameters
    ----------
    name : str
        TensorRT-LLM's name. ``attention.qkv`` changes; where the model normalizes Q and K, the norms' weights instead.
    tensor : numpy.ndarray
        The unsharded tensor.
    config : ModelConfig
    smoothing : numpy.ndarray
        float32 ``[num_layers, num_kv_heads, head_dim / 2]``. A q/k norm's weights are shared by all heads, and so must
        be its layer's factors.

    Returns
    -------
    numpy.ndarray
        fp32 where it was folded, for the caller to round once; else the tensor itself.

    Raises
    ------
    ConfigError
        If the heads of a layer with a q/k norm have different factors.
    """
    layer = layer_of(name)
    if layer is None:
        return tensor
    factors = np.concatenate([smoothing[layer], smoothing[layer]], axis=-1).astype(np.float32)  # NeoX half-split pairs
    if not config.qk_layernorm:
        return _scale_qk(tensor, factors, config) if _QKV.search(name) else tensor
    if not name.endswith((_Q_NORM, _K_NORM)):
        return tensor
    if (factors != factors[0]).any():
        raise ConfigError(
            f"the key smoothing of layer {layer} differs from head to head, and this model's q/k norm is shared by all "
            "of them: calibrate this model anew with saw-calibrate"
        )
    weight = tensor.astype(np.float32)
    return weight * factors[0] if name.endswith(_Q_NORM) else weight / factors[0]


def layer_of(name: str) -> int | None:
    """Number of the layer that a tensor belongs to, or None."""
    parts = name.split(".", 3)
    return int(parts[2]) if parts[:2] == ["transformer", "layers"] else None


def _scale_qk(tensor: np.ndarray, factors: np.ndarray, config: ModelConfig) -> np.ndarray:
    """Rows of Q times, and rows of K over, ``factors [num_kv_heads, head_dim]``."""
    queries, keys = config.num_attention_heads * config.head_size, config.num_key_value_heads * config.head_size
    scaled = tensor.astype(np.float32)
    rows = scaled.reshape(len(scaled), -1)
    rows[:queries] *= np.repeat(factors, config.num_queries_per_kv, axis=0).reshape(-1, 1)
    rows[queries : queries + keys] /= factors.reshape(-1, 1)
    return scaled
