"""The calibration file."""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save

from saw_trtllm.checkpoint import Checkpoint
from saw_trtllm.engine.config import k_center_name
from saw_trtllm.errors import ConfigError
from saw_trtllm.files import replacing_file
from saw_trtllm.paths import is_file

if TYPE_CHECKING:
    pass


#: What two models must have in common for one's statistics to fit the other.
_SHAPE = (
    *("architecture", "num_hidden_layers", "hidden_size", "num_attention_heads", "num_key_value_heads", "head_size"),
    *("rotary_base", "rotary_scaling"),
)


_PROBED = ("qkv.weight", "qkv.bias", "q_layernorm.weight", "k_layernorm.weight")


_PROBE_SIZE = 4096


#: Relative distance of two probes of one model: rounding it to bfloat16 makes 0.0017.
_PROBE_TOLERANCE = 0.005


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
            theirs = model_shape(checkpoint)[key]
            if ours != theirs:
                raise ConfigError(
                    f"the calibration is of a model with {key} {ours} and {checkpoint.folder} has {theirs}: run "
                    "saw-calibrate on this model"
                )
        found = probe_weights(checkpoint)
        for name, ours in self.probe.items():
            fits = name in found and found[name].shape == ours.shape
            distance = np.linalg.norm(ours - found[name]) if fits else np.inf
            if not distance <= _PROBE_TOLERANCE * np.linalg.norm(ours):
                raise ConfigError(
                    f"the calibration is of other weights than {checkpoint.folder} has in {name!a}: run saw-calibrate "
                    "on this model"
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
            fields, num_tokens = json.loads(metadata["model"]), int(metadata["num_tokens"])
            shape = {key: fields[key] for key in _SHAPE}
            layers, heads, dim = (shape[k] for k in ("num_hidden_layers", "num_key_value_heads", "head_size"))
        except (OSError, SafetensorError, KeyError, ValueError, TypeError) as e:
            raise ConfigError(f"{path} cannot be read as a calibration ({e}): write it anew with saw-calibrate") from e
        finite = all(np.isfinite(x).all() for x in (k_center, smoothing, *tensors.values())) and (smoothing > 0).all()
        if (k_center.shape, smoothing.shape) != ((layers, heads, dim), (layers, heads, dim // 2)) or not finite:
            raise ConfigError(
                f"{path} is damaged: its centers or factors do not fit its model: write it anew with saw-calibrate"
            )
        probe = {name.removeprefix("probe."): sample for name, sample in tensors.items()}
        return cls(k_center, smoothing, shape, probe, num_tokens)


def model_shape(checkpoint: Checkpoint) -> dict[str, Any]:
    """What a calibration file records of its model."""
    return {key: getattr(checkpoint.config, key) for key in _SHAPE}


def probe_weights(checkpoint: Checkpoint) -> dict[str, np.ndarray]:
    """Evenly spread weights of the first and the last layer that keys and queries come from."""
    return dict(_samples(checkpoint))


def _samples(checkpoint: Checkpoint) -> Iterable[tuple[str, np.ndarray]]:
    for layer in sorted({0, checkpoint.config.num_hidden_layers - 1}):
        for kind in _PROBED:
            name = f"transformer.layers.{layer}.attention.{kind}"
            if name in checkpoint.names():
                weights = checkpoint.load(name).reshape(-1)
                yield name, weights[:: max(1, len(weights) // _PROBE_SIZE)].astype(np.float32)
