"""A decoder's constants: what a build puts into the network, and a refit into an engine that has none."""

from __future__ import annotations

from collections.abc import Callable
from typing import cast

import numpy as np

from saw_trtllm.checkpoint.layout import is_norm
from saw_trtllm.engine.config import EngineConfig
from saw_trtllm.model.quantization import Weight
from saw_trtllm.model.rope import rotary_cos_sin
from saw_trtllm.ops import pack_frame
from saw_trtllm.plugins.layer import K_FRAME, Q_FRAME, ROTARY_COS_SIN

Load = Callable[[str], Weight]

#: Of a layer: the weights of the norms of Q and K, a row for each head.
QK_LAYERNORM = "attention.qk_layernorm"


def rope_table(local: bool) -> str:
    """Name of the table of cosines and sines, or of that of the layers that have a RoPE of their own."""
    return ROTARY_COS_SIN + "_local" * local


class Constants:
    """The named constants of a decoder, in the shape and dtype that its network has them in.

    Parameters
    ----------
    config : EngineConfig
    load : callable
        Gives the tensor of a TensorRT-LLM name in the engine's dtype, a layer's center and frames in float32.
    """

    def __init__(self, config: EngineConfig, load: Load) -> None:
        self._config, self._model, self._load = config, config.pretrained_config, load

    def __getitem__(self, name: str) -> np.ndarray:
        """The constant of a name."""
        for local in (False, True):
            if name == rope_table(local):
                return rotary_cos_sin(self._model, self._config.build_config.max_seq_len, local)
        if name.endswith(QK_LAYERNORM):
            return self._qk_layernorm(name.removesuffix("qk_layernorm"))
        array = self._dense(name)
        if is_norm(name):
            return array.astype(np.float32)[None]
        if name.endswith((K_FRAME, Q_FRAME)):
            return pack_frame(array)
        return array[None] if name.endswith("qkv.bias") else array

    def _dense(self, name: str) -> np.ndarray:
        return cast(np.ndarray, self._load(name))

    def _qk_layernorm(self, prefix: str) -> np.ndarray:
        """float32 ``[num_heads + num_kv_heads, head_dim]``; where TensorRT norms all heads, 1 for those of V too."""
        heads, kv_heads = self._model.num_attention_heads, self._model.num_key_value_heads
        q, k = (self._dense(f"{prefix}{x}_layernorm.weight").astype(np.float32) for x in "qk")
        rows = [np.tile(q, (heads, 1)), np.tile(k, (kv_heads, 1))]
        if self._config.build_config.plugin_config.gemm_plugin is None:
            rows.append(np.ones((kv_heads, self._model.head_size), np.float32))
        return np.concatenate(rows)
