"""Models with planted key outliers that compute what they computed before.

Large checkpoints have a few key channels far above the rest, in the same place for every token: about ten times (Lin et
al., arXiv 2405.04532), mostly in the slow RoPE pairs (Jin et al., arXiv 2502.01563). The norm of Qwen2.5-7B's key bias
is 605 in the first layer, 921 in the last and 22 in the median (reported in ggml-org/llama.cpp, issue 21385). A small
trained model has none of it, so it is planted here:

- :func:`plant_outliers` multiplies RoPE pairs of the keys, and divides those of the queries, by a factor.
- :func:`plant_key_bias` adds a constant to keys in RoPE pairs that do not turn. There it changes all scores of a query
  by the same, which the softmax ignores. A pair that turns would not do: the change would depend on the distance.

Both leave the function as it was, exactly in real numbers and to rounding in fp32: the first that of the checkpoint,
the second that of :func:`stop_slow_pairs`, which differs from the checkpoint by what its slowest pairs turned.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import numpy as np

from saw_trtllm.checkpoint import Checkpoint
from saw_trtllm.errors import ConfigError
from saw_trtllm.format import DTYPE_BYTES
from saw_trtllm.model.config import ModelConfig
from saw_trtllm.model.fold import layer_of
from saw_trtllm.model.rope import inverse_frequencies

#: What keys of planted pairs are multiplied by: from below what is reported of channels to some times as much.
FACTORS = (8.0, 16.0, 32.0)
#: A pair that turns this little over the longest context is as good as still.
_STILL = 1e-5


class PlantedCheckpoint(Checkpoint):
    """A checkpoint some of whose tensors are computed from another's.

    Parameters
    ----------
    source : Checkpoint
    config : ModelConfig
        The changed model's.
    edit : callable
        Takes the name and the source's tensor, or None where the source has none, and gives the tensor.
    """

    def __init__(self, source: Checkpoint, config: ModelConfig, edit: Callable[[str, Any], np.ndarray]) -> None:
        super().__init__(source.folder, config, parts={}, quantized={}, sharded=False)
        self._source = source
        self._edit = edit

    def nbytes(self, dtype: str | None = None) -> int:
        """Bytes of the weights in ``dtype``, or in the model's own."""
        return self.num_parameters() * DTYPE_BYTES[dtype or self.config.dtype]

    def load(self, name: str) -> np.ndarray:
        """Read a whole tensor; fp32 where it was changed."""
        known = name in self._source.names()
        return self._edit(name, self._source.load(name) if known else None)


def plant_outliers(
    checkpoint: Checkpoint, pairs_per_head: int = 2, factors: tuple[float, ...] = FACTORS, seed: int = 0
) -> PlantedCheckpoint:
    """Make a few of the slower RoPE pairs of each KV head's keys outliers.

    Parameters
    ----------
    checkpoint : Checkpoint
    pairs_per_head : int
        Outliers of a KV head, at random among the slower half of its pairs. Where the model has a q/k norm, whose
        weights all heads share, they are the same for all heads of a layer.
    factors : tuple of float
        What an outlier's keys are multiplied by, drawn from these. With powers of two fp32 results keep every bit.
    seed : int

    Returns
    -------
    PlantedCheckpoint
    """
    config = checkpoint.config
    planted = np.ones((config.num_hidden_layers, config.num_key_value_heads, config.head_size // 2), np.float32)
    rng = np.random.default_rng(seed)
    for layer in planted:
        heads = layer[:1] if config.qk_layernorm else layer
        for head in heads:
            pairs = config.head_size // 4 + rng.choice(config.head_size // 4, pairs_per_head, replace=False)
            head[pairs] = rng.choice(factors, pairs_per_head)
        layer[:] = heads  # a q/k norm's one head for all
    return PlantedCheckpoint(checkpoint, config, lambda name, x: scale_key_pairs(name, x, config, planted))


def scale_key_pairs(name: str, tensor: np.ndarray, config: ModelConfig, factors: np.ndarray) -> np.ndarray:
    """The tensor with keys multiplied, and queries divided, by a factor for each RoPE pair, which turns as before.

    Parameters
    ----------
    name : str
        TensorRT-LLM's name. ``attention.qkv`` changes; where the model normalizes Q and K, the norms' weights instead.
    tensor : numpy.ndarray
        The unsharded tensor.
    config : ModelConfig
    factors : numpy.ndarray
        float32 ``[num_layers, num_kv_heads, head_dim / 2]``; a q/k norm, whose weights all heads share, takes the first
        head's.
    """
    layer = layer_of(name)
    if layer is None:
        return tensor
    both = np.concatenate([factors[layer], factors[layer]], axis=-1)  # NeoX half-split pairs
    if config.qk_layernorm:
        changes = {"q_layernorm.weight": 1 / both[0], "k_layernorm.weight": both[0]}
        return tensor.astype(np.float32) * changes[kind] if (kind := name.split(".", 4)[-1]) in changes else tensor
    if not re.search(r"\.attention\.qkv\.(weight|bias)$", name):
        return tensor
    queries, keys = config.num_attention_heads * config.head_size, config.num_key_value_heads * config.head_size
    scaled = tensor.astype(np.float32)
    rows = scaled.reshape(len(scaled), -1)
    rows[:queries] /= np.repeat(both, config.num_queries_per_kv, axis=0).reshape(-1, 1)
    rows[queries : queries + keys] *= both.reshape(-1, 1)
    return scaled


def stop_slow_pairs(checkpoint: Checkpoint, count: int) -> PlantedCheckpoint:
    """Let the ``count`` slowest RoPE pairs turn no more, with nothing but llama3's RoPE scaling in the config.

    This changes the model a little: over a context of n tokens a pair would have turned by n times its frequency. With
    Qwen2.5's base of 1e6 that is next to nothing (0.003 at 2048 tokens), with 1e4 it is 0.24.

    Raises
    ------
    ConfigError
        If the model already has a RoPE scaling.
    """
    config = checkpoint.config
    if config.rotary_scaling is not None:
        raise ConfigError(
            f"{checkpoint.folder} has a RoPE scaling already, and slow pairs are stopped by one: use a model without it"
        )
    frequencies, _ = inverse_frequencies(config)
    original = config.max_position_embeddings // 2
    last_kept, first_still = original * frequencies[[-count - 1, -count]] / (2 * np.pi)
    scaling = {
        "rope_type": "llama3",
        "factor": float(2 ** np.ceil(np.log2(frequencies[-count] * config.max_position_embeddings / _STILL))),
        "low_freq_factor": float(first_still * 1.01),
        "high_freq_factor": float(last_kept * 0.99),
        "original_max_position_embeddings": original,
    }
    return PlantedCheckpoint(checkpoint, config.model_copy(update={"rotary_scaling": scaling}), lambda name, x: x)


def plant_key_bias(
    checkpoint: Checkpoint, pairs_per_head: int = 2, magnitude: float = 30.0, seed: int = 0
) -> PlantedCheckpoint:
    """Add a large constant to a few channels of all keys, as Qwen2.5's key bias does.

    The model becomes a Qwen2, the family that has such a bias, with its slowest RoPE pairs stopped.

    Parameters
    ----------
    checkpoint : Checkpoint
    pairs_per_head : int
        The bias is in the slowest pairs, in one random channel of each.
    magnitude : float
        The bias is this or twice it, of either sign.
    seed : int

    Returns
    -------
    PlantedCheckpoint
        Its function is that of ``stop_slow_pairs(checkpoint, pairs_per_head)``.

    Raises
    ------
    ConfigError
        If the model has a q/k norm, after which it has no bias.
    """
    still = stop_slow_pairs(checkpoint, pairs_per_head)
    config, half = still.config, still.config.head_size // 2
    if config.qk_layernorm:
        raise ConfigError(f"{checkpoint.folder} has a q/k norm, and a key bias goes before it: use a model without one")
    rng = np.random.default_rng(seed)
    bias = np.zeros((config.num_hidden_layers, config.num_key_value_heads, config.head_size), np.float32)
    for head in bias.reshape(-1, config.head_size):
        channels = np.arange(half - pairs_per_head, half) + half * rng.integers(2, size=pairs_per_head)
        head[channels] = magnitude * rng.choice((-2.0, -1.0, 1.0, 2.0), pairs_per_head)
    first = config.num_attention_heads * config.head_size
    config = config.model_copy(update={"architecture": "Qwen2ForCausalLM", "attn_bias": True})

    def edit(name: str, tensor: Any) -> np.ndarray:
        if not name.endswith(".attention.qkv.bias"):
            return tensor
        rows = (config.num_attention_heads + 2 * config.num_key_value_heads) * config.head_size
        out = np.zeros(rows, np.float32) if tensor is None else tensor.astype(np.float32)
        keys = bias[layer_of(name)].reshape(-1)
        out[first : first + len(keys)] += keys
        return out

    return PlantedCheckpoint(still, config, edit)
