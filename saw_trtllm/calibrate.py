"""The door from text to a calibration: statistics of the keys of a model as it reads."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch

from saw_trtllm.backends.reference.window import Attended, WindowModel
from saw_trtllm.checkpoint import Checkpoint
from saw_trtllm.checkpoint.calibration import Calibration, model_shape, probe_weights
from saw_trtllm.errors import ConfigError

#: Fewer tokens than this say little about 128 channels.
MIN_TOKENS = 256


#: A pair whose keys or queries are smaller than this part of the head's is taken to be so large, lest factors run away.
_FLOOR = 1e-3


class KeyStatistics:
    """Sums over tokens of keys, their squares and the squares of queries: a layer's at a time, whatever the text.

    Parameters
    ----------
    num_layers : int
    """

    def __init__(self, num_layers: int) -> None:
        self._sums: list[list[Any]] = [[0, 0, 0, 0] for _ in range(num_layers)]

    def add(self, layer: int, attended: Attended) -> None:
        """Take in a layer's queries and keys of some tokens, both behind RoPE."""
        # In fp64: a large mean's square would drown the variance.
        q, k = attended.q.double(), attended.k.double()
        sums = self._sums[layer]
        for i, x in enumerate((len(k), k.sum(0), k.square().sum(0), q.square().sum(0))):
            sums[i] = sums[i] + x

    def moments(self, layer: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Mean and variance of keys, float64 ``[num_kv_heads, head_dim]``, and mean square of their group's queries."""
        count, k, k2, q2 = self._sums[layer]
        mean = k / count
        grouped = (q2 / count).unflatten(0, (len(mean), -1)).mean(1)
        return tuple(x.cpu().numpy() for x in (mean, (k2 / count - mean.square()).clamp_min(0), grouped))


def calibrate(
    checkpoint: Checkpoint,
    windows: torch.Tensor,
    progress: Callable[[int], None] | None = None,
    device: str = "cpu",
) -> Calibration:
    """Run a text through the exact model and gather :class:`Calibration`.

    Parameters
    ----------
    checkpoint : Checkpoint
    windows : torch.Tensor
        int64 ``[num_windows, T]``: sequences of tokens, each from position 0. A mean holds for the positions that it
        was taken at: slow RoPE pairs turn beyond them, so T should be what the engine will see.
    progress : callable, optional
        Called with the tokens of each window that is done.
    device : str
        Where PyTorch computes.

    Raises
    ------
    CheckpointError
        If a weight cannot be read or is not finite.
    ConfigError
        If there are fewer than :data:`MIN_TOKENS` tokens.
    """
    if windows.numel() < MIN_TOKENS:
        raise ConfigError(
            f"the text gives {windows.numel()} tokens and calibration needs {MIN_TOKENS}: give a longer one"
        )
    config = checkpoint.config

    model = WindowModel(config, checkpoint.load_finite, windows.shape[1], device)
    model.check_ids(windows)
    statistics = KeyStatistics(config.num_hidden_layers)
    for window in windows:
        model.hidden(window[None], observe=statistics.add)
        if progress is not None:
            progress(len(window))
    moments = [statistics.moments(i) for i in range(config.num_hidden_layers)]
    smoothing = np.stack([_smoothing(var, q2, config.qk_layernorm) for _, var, q2 in moments])
    k_center = np.stack([mean for mean, _, _ in moments]) / np.concatenate([smoothing, smoothing], axis=-1)
    return Calibration(
        k_center.astype(np.float32),
        smoothing.astype(np.float32),
        model_shape(checkpoint),
        probe_weights(checkpoint),
        windows.numel(),
    )


def _smoothing(variance: np.ndarray, q_square: np.ndarray, shared: bool) -> np.ndarray:
    """Factors ``[num_kv_heads, head_dim / 2]`` of a layer, the same for all heads where they share a q/k norm."""
    k, q = (x.reshape(len(x), 2, -1).mean(1) for x in (variance, q_square))
    if shared:
        k, q = (np.broadcast_to(x.mean(0), x.shape) for x in (k, q))
    k, q = (np.maximum(x, _FLOOR**2 * x.mean(-1, keepdims=True) + np.finfo(np.float32).tiny) for x in (k, q))
    factors = (k / q) ** 0.25
    return factors / np.exp(np.log(factors).mean(-1, keepdims=True))
