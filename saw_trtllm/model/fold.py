"""What an engine's weights take in, so that nothing is left to do at run time: V's rotation, or its frame.

With B the block-diagonal Hadamard matrix (symmetric, its own inverse) the cache holds ``v B``, attention is linear in
V, so its output is ``o B``, and the output projection undoes it. A frame of a calibration is any invertible matrix in
B's place, one for each KV head.
"""

from __future__ import annotations

import re

import numpy as np

from saw_trtllm.format import KVFormat, rotate
from saw_trtllm.model.config import ModelConfig

_QKV = re.compile(r"\.attention\.qkv\.(weight|bias)$")
_DENSE = re.compile(r"\.attention\.dense\.weight$")


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
        folded[first:] = rotate(folded[first:], order, axis=0)
        return folded
    return tensor


def fold_v_frame(name: str, tensor: np.ndarray, config: ModelConfig, frame: np.ndarray) -> np.ndarray:
    """The tensor as an engine needs it whose cache holds each head's values times a frame.

    Parameters
    ----------
    name : str
        TensorRT-LLM's name. Only ``attention.qkv`` and ``attention.dense.weight`` change.
    tensor : numpy.ndarray
        The unsharded tensor.
    config : ModelConfig
    frame : numpy.ndarray
        ``[num_kv_heads, head_dim, head_dim]``, of the tensor's layer: values become ``v @ frame``.

    Returns
    -------
    numpy.ndarray
        fp32 where it was folded, for the caller to round once; else the tensor itself.
    """
    if _DENSE.search(name):
        # An output o of a head comes as o F, and o Wᵀ = (o F) (W F⁻ᵀ)ᵀ.
        inverse = np.ascontiguousarray(np.linalg.inv(frame.astype(np.float64)).swapaxes(-1, -2))
        heads = tensor.astype(np.float64).reshape(len(tensor), len(frame), -1, frame.shape[-1])
        # Products of a few rows each, which a BLAS does not spread over threads: those are taken by other tensors.
        return (heads @ inverse).reshape(tensor.shape).astype(np.float32)
    if _QKV.search(name):
        first = (config.num_attention_heads + config.num_key_value_heads) * config.head_size
        folded = tensor.astype(np.float32)
        heads = folded[first:].reshape(*frame.shape[:2], -1).astype(np.float64)
        folded[first:] = (frame.swapaxes(-1, -2) @ heads).reshape(folded[first:].shape)
        return folded
    return tensor


def layer_of(name: str) -> int | None:
    """Number of the layer that a tensor belongs to, or None."""
    parts = name.split(".", 3)
    return int(parts[2]) if parts[:2] == ["transformer", "layers"] else None
