"""What is known of a model's keys before it is built: their centers, and the smoothing of their RoPE pairs.

Both leave the function as it was and make keys easier to quantize. The softmax ignores what all scores of a query have
in common, so one fixed vector may be subtracted from all keys of a head; and a RoPE pair of the keys may be divided by
a factor that the queries' is multiplied by (:mod:`saw_trtllm.fold`). The noise of rotated rows is proportional to the
keys' norm, and a score takes up as much of it as the query's norm, so the best factors are those that make
``Σ k²/s² · Σ q² s²`` least: ``s = sqrt(rms_k / rms_q)`` of each pair (Cauchy and Schwarz), with the keys centred.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save

from saw_trtllm.checkpoint import Checkpoint
from saw_trtllm.engine import k_center_name
from saw_trtllm.errors import ConfigError
from saw_trtllm.files import replacing_file
from saw_trtllm.paths import is_file

if TYPE_CHECKING:
    import torch

    from saw_trtllm.eval.forward import Attended

#: What two models must have in common for one's statistics to fit the other.
_SHAPE = (
    *("architecture", "num_hidden_layers", "hidden_size", "num_attention_heads", "num_key_value_heads", "head_size"),
    *("rotary_base", "rotary_scaling"),
)
_PROBED = ("qkv.weight", "qkv.bias", "q_layernorm.weight", "k_layernorm.weight")
_PROBE_SIZE = 4096
#: Relative distance of two probes of one model: rounding it to bfloat16 makes 0.0017.
_PROBE_TOLERANCE = 0.005
#: Fewer tokens than this say little about 128 channels.
MIN_TOKENS = 256
#: A pair whose keys or queries are smaller than this part of the head's is taken to be so large, lest factors run away.
_FLOOR = 1e-3


@dataclass(frozen=True, eq=False)
class Calibration:
    """Statistics of a model's keys and queries on a text, as ``saw-calibrate`` writes them.

    Attributes
    ----------
    k_center : numpy.ndarray
        float32 ``[num_layers, num_kv_heads, head_dim]``: mean of the keys behind RoPE, smoothed, before rotation.
    smoothing : numpy.ndarray
        float32 ``[num_layers, num_kv_heads, head_dim / 2]``: what a RoPE pair's keys are divided by and the queries of
        the group multiplied by. Their geometric mean over a head is 1, since a factor on all of a row is no help.
    shape : dict
        The model's fields that must fit.
    probe : dict[str, numpy.ndarray]
        Some of its weights, by name.
    num_tokens : int
        Tokens of the text.
    """

    k_center: np.ndarray
    smoothing: np.ndarray
    shape: dict[str, Any]
    probe: dict[str, np.ndarray]
    num_tokens: int

    @cached_property
    def centers(self) -> dict[str, np.ndarray]:
        """Each layer's ``[num_kv_heads, head_dim]`` under its name in an engine."""
        return {k_center_name(i): center for i, center in enumerate(self.k_center)}

    def describe(self) -> str:
        """What it holds, in a line."""
        return (
            f"keys centred by up to {np.abs(self.k_center).max():.3g} and smoothed by {self.smoothing.min():.3g} to "
            f"{self.smoothing.max():.3g}, from {self.num_tokens:,} tokens"
        )

    def without_centring(self) -> Calibration:
        """The smoothing alone."""
        return replace(self, k_center=np.zeros_like(self.k_center))

    def without_smoothing(self) -> Calibration:
        """The centring alone."""
        factors = np.concatenate([self.smoothing, self.smoothing], axis=-1)
        return replace(self, k_center=self.k_center * factors, smoothing=np.ones_like(self.smoothing))

    def check(self, checkpoint: Checkpoint) -> None:
        """Refuse to be used for another model.

        Raises
        ------
        ConfigError
            If a field of the shape differs, or the weights do by more than a cast to 16 bits makes them.
        """
        for key, ours in self.shape.items():
            theirs = _shape(checkpoint)[key]
            if ours != theirs:
                raise ConfigError(
                    f"the calibration is of a model with {key} {ours} and {checkpoint.folder} has {theirs}: run "
                    "saw-calibrate on this model"
                )
        found = _probe(checkpoint)
        for name, ours in self.probe.items():
            distance = np.linalg.norm(ours - found[name]) if name in found else np.inf
            if not distance <= _PROBE_TOLERANCE * np.linalg.norm(ours):
                raise ConfigError(
                    f"the calibration is of other weights than {checkpoint.folder} has in {name}: run saw-calibrate on "
                    "this model"
                )

    def save(self, path: Path | str) -> None:
        """Write a safetensors file, whole or not at all.

        Raises
        ------
        ConfigError
            If it cannot be written.
        """
        tensors = {"k_center": self.k_center, "smoothing": self.smoothing}
        tensors |= {f"probe.{name}": sample for name, sample in self.probe.items()}
        metadata = {"format": "saw_trtllm calibration 1", "model": json.dumps(self.shape)}
        try:
            with replacing_file(path) as file:
                file.write(save(tensors, metadata | {"num_tokens": str(self.num_tokens)}))
        except OSError as e:
            raise ConfigError(f"{path} cannot be written ({e.strerror or e}): choose another --output") from e

    @classmethod
    def load(cls, path: Path | str) -> Calibration:
        """Read what :meth:`save` wrote.

        Raises
        ------
        ConfigError
            If it is missing, damaged or no calibration.
        """
        path = Path(path)
        if not is_file(path):
            raise ConfigError(f"{path} is not a file: give the --output of saw-calibrate")
        try:
            with safe_open(path, framework="np") as file:
                metadata = file.metadata() or {}
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a mapping)
            k_center, smoothing = tensors.pop("k_center"), tensors.pop("smoothing")
            shape, num_tokens = json.loads(metadata["model"]), int(metadata["num_tokens"])
            layers, heads, dim = (shape[k] for k in ("num_hidden_layers", "num_key_value_heads", "head_size"))
        except (OSError, SafetensorError, KeyError, ValueError, TypeError) as e:
            raise ConfigError(f"{path} cannot be read as a calibration ({e}): write it anew with saw-calibrate") from e
        finite = all(np.isfinite(x).all() for x in (k_center, smoothing)) and (smoothing > 0).all()
        if (k_center.shape, smoothing.shape) != ((layers, heads, dim), (layers, heads, dim // 2)) or not finite:
            raise ConfigError(
                f"{path} is damaged: its centers or factors do not fit its model: write it anew with saw-calibrate"
            )
        probe = {name.removeprefix("probe."): sample for name, sample in tensors.items()}
        return cls(k_center, smoothing, shape, probe, num_tokens)


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
    from saw_trtllm.eval.forward import WindowModel  # needs PyTorch, which reading a calibration does not

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
        _shape(checkpoint),
        _probe(checkpoint),
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


def _shape(checkpoint: Checkpoint) -> dict[str, Any]:
    return {key: getattr(checkpoint.config, key) for key in _SHAPE}


def _probe(checkpoint: Checkpoint) -> dict[str, np.ndarray]:
    """Evenly spread weights of the first and the last layer that keys and queries come from."""
    return dict(_samples(checkpoint))


def _samples(checkpoint: Checkpoint) -> Iterable[tuple[str, np.ndarray]]:
    for layer in sorted({0, checkpoint.config.num_hidden_layers - 1}):
        for kind in _PROBED:
            name = f"transformer.layers.{layer}.attention.{kind}"
            if name in checkpoint.names():
                weights = checkpoint.load(name).reshape(-1)
                yield name, weights[:: max(1, len(weights) // _PROBE_SIZE)].astype(np.float32)
