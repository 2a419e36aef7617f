"""A decoder's weights: which of them its network has as constants, and which are inputs that plugins alone read."""

from __future__ import annotations

from collections.abc import Callable
from threading import Lock
from typing import cast

import numpy as np

from saw_trtllm.checkpoint.layout import (
    EMBEDDING,
    LM_HEAD,
    expected_shapes,
    is_linear,
    is_norm,
    shard_format,
    shard_shape,
)
from saw_trtllm.engine.config import EngineConfig
from saw_trtllm.model.quantization import QuantizedWeight, TensorSpec, Weight, WeightFormat
from saw_trtllm.model.rope import rotary_cos_sin
from saw_trtllm.ops import PackedShape, pack_frame, pack_weight
from saw_trtllm.plugins.layer import K_FRAME, Q_FRAME, ROTARY_COS_SIN

Load = Callable[[str], Weight]
LoadArray = Callable[[str], np.ndarray]

#: What of a quantized weight the network has, after the weight's name: see :func:`saw_trtllm.ops.pack_weight`.
VALUES, SCALES, PRE_SCALE = ".values", ".scales", ".pre_scale"

#: Of a layer: the weights of the norms of Q and K, a row for each head.
QK_LAYERNORM = "attention.qk_layernorm"


def rope_table(local: bool) -> str:
    """Name of the table of cosines and sines, or of that of the layers that have a RoPE of their own."""
    return ROTARY_COS_SIN + "_local" * local


def packed_shape(format: WeightFormat, shape: tuple[int, ...]) -> PackedShape:
    """Shapes of the arrays of a quantized weight ``[out, in]``.

    Raises
    ------
    OpError
        If no kernel takes it.
    """
    return PackedShape.of(format.kind, shape, format.block[1])


def quantizes_input(format: WeightFormat, shape: tuple[int, ...]) -> bool:
    """Whether a layer with a weight ``[out, in]`` multiplies many rows in 8 bits: as its checkpoint says (W8A8).

    The product takes a scale for each row of the input and one for each output.
    """
    return format.activation == "token" and format.block[1] >= shape[1] and shape[0] % 16 == 0


def packed_tensors(name: str, format: WeightFormat, shape: tuple[int, ...]) -> dict[str, TensorSpec]:
    """The arrays of a quantized weight, by name."""
    packed = packed_shape(format, shape)
    found = {name + VALUES: TensorSpec(packed.values, "int32"), name + SCALES: TensorSpec(packed.scales, "float32")}
    if format.pre_scale:
        found[name + PRE_SCALE] = TensorSpec((packed.in_features,), "float32")
    return found


def weight_inputs(config: EngineConfig) -> dict[str, TensorSpec]:
    """The weights that are inputs of each rank's engine: those of which TensorRT would only be the keeper.

    With the GEMM plugin all large ones are. A build then takes no longer for them, and who opens an engine puts them
    where the plugins read them.

    Parameters
    ----------
    config : EngineConfig
        Of all ranks.
    """
    if config.build_config.plugin_config.gemm_plugin is None:
        return {}
    model, size = config.pretrained_config, config.tp_size
    found: dict[str, TensorSpec] = {}
    for name in expected_shapes(model):
        if not (is_linear(name) or name == EMBEDDING) or (name == LM_HEAD and model.share_embedding_table):
            continue
        shape, format = shard_shape(name, model, size), config.saw_int4.quantized.get(name)
        if format is None:
            found[name] = TensorSpec(shape, model.dtype)
        else:
            packed = packed_tensors(name, shard_format(name, format, model, size), shape)
            found |= {n: spec for n, spec in packed.items() if not n.endswith(PRE_SCALE)}
    return found


class PackedWeights:
    """Gives tensors by name: of quantized weights, which are loaded once, the arrays of :func:`packed_tensors`.

    Threads may ask at once.
    """

    def __init__(self, load: Load) -> None:
        self._load = load
        self._arrays: dict[str, np.ndarray] = {}
        self._lock = Lock()

    def __call__(self, name: str) -> np.ndarray:
        """The array of a name, once."""
        if not name.endswith((VALUES, SCALES, PRE_SCALE)):
            return cast(np.ndarray, self._load(name))
        with self._lock:
            return self._packed(name)

    def _packed(self, name: str) -> np.ndarray:
        if name in self._arrays:
            return self._arrays.pop(name)
        weight_name = name.removesuffix(VALUES).removesuffix(SCALES).removesuffix(PRE_SCALE)
        weight = cast(QuantizedWeight, self._load(weight_name))
        format = weight.format
        values, scales = pack_weight(format.kind, weight.values, weight.scales, weight.zeros, format.block)
        self._arrays |= {weight_name + VALUES: values, weight_name + SCALES: scales}
        if weight.pre_scale is not None:
            self._arrays[weight_name + PRE_SCALE] = weight.pre_scale
        return self._arrays.pop(name)


class Constants:
    """The named constants of a decoder, in the shape and dtype that its network has them in.

    Parameters
    ----------
    config : EngineConfig
    load : callable
        Gives the tensor of a TensorRT-LLM name in the engine's dtype, a layer's center and frames in float32; those of
        quantized weights as :class:`PackedWeights`.
    """

    def __init__(self, config: EngineConfig, load: LoadArray) -> None:
        self._config, self._model, self._load = config, config.pretrained_config, load

    def __getitem__(self, name: str) -> np.ndarray:
        """The constant of a name."""
        for local in (False, True):
            if name == rope_table(local):
                return rotary_cos_sin(self._model, self._config.build_config.max_seq_len, local)
        if name.endswith(QK_LAYERNORM):
            return self._qk_layernorm(name.removesuffix("qk_layernorm"))
        array = self._load(name)
        if is_norm(name):
            return array.astype(np.float32)[None]
        if name.endswith((K_FRAME, Q_FRAME)):
            return pack_frame(array)
        if name.endswith(PRE_SCALE):
            return array[None]
        return array[None] if name.endswith("qkv.bias") else array

    def _qk_layernorm(self, prefix: str) -> np.ndarray:
        """float32 ``[num_heads + num_kv_heads, head_dim]``; where TensorRT norms all heads, 1 for those of V too."""
        heads, kv_heads = self._model.num_attention_heads, self._model.num_key_value_heads
        q, k = (self._load(f"{prefix}{x}_layernorm.weight").astype(np.float32) for x in "qk")
        rows = [np.tile(q, (heads, 1)), np.tile(k, (kv_heads, 1))]
        if self._config.build_config.plugin_config.gemm_plugin is None:
            rows.append(np.ones((kv_heads, self._model.head_size), np.float32))
        return np.concatenate(rows)
