"""Rotate V in the weights: W_v takes the rotation, W_o takes it back, and nothing is left to do at run time.

With B the block-diagonal Hadamard matrix (symmetric, its own inverse): the cache holds ``v B``, attention is linear in
V, so its output is ``o B``, and the output projection undoes it.
"""

from __future__ import annotations

import re

import numpy as np

from saw_trtllm.config import ModelConfig
from saw_trtllm.format import KVFormat, rotate

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
