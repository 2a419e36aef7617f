"""The calibration file."""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save

from saw_trtllm.checkpoint import Checkpoint
from saw_trtllm.engine.config import k_center_name, k_frame_name, q_frame_name
from saw_trtllm.errors import ConfigError
from saw_trtllm.files import replacing_file
from saw_trtllm.paths import is_file

#: What two models must have in common for one's statistics to fit the other.
_SHAPE = (
    *("architecture", "num_hidden_layers", "hidden_size", "num_attention_heads", "num_key_value_heads", "head_size"),
    *("rotary_base", "rotary_scaling"),
)


_FORMAT = "saw_trtllm calibration 2"
#: Of a frame: beyond it fp32, with its 24 bits, would lose more of a score than 4 bits do.
_MAX_CONDITION = 1e5


_PROBED = ("qkv.weight", "qkv.bias", "q_layernorm.weight", "k_layernorm.weight")


_PROBE_SIZE = 4096


#: Relative distance of two probes of one model: rounding it to bfloat16 makes 0.0017.
_PROBE_TOLERANCE = 0.005


@dataclass(frozen=True, eq=False)
class Calibration:
    """What ``saw-calibrate`` found in a model's keys, queries and values on a text.

    Attributes
    ----------
    k_center : numpy.ndarray
        float32 ``[num_layers, num_kv_heads, head_dim]``, subtracted from the keys after RoPE.
    k_frame : numpy.ndarray
        float32 ``[num_layers, num_kv_heads, head_dim, head_dim]``: what centred keys are multiplied by, as rows, in
        place of their rotation.
    v_frame : numpy.ndarray
        The same of the values, which the weights take in.
    shape : dict
        The model's fields that must fit.
    probe : dict[str, numpy.ndarray]
        Some of its weights, by name.
    num_tokens : int
        Tokens of the text.
    """

    k_center: np.ndarray
    k_frame: np.ndarray
    v_frame: np.ndarray
    shape: dict[str, Any]
    probe: dict[str, np.ndarray]
    num_tokens: int

    @cached_property
    def q_frame(self) -> np.ndarray:
        """Inverse transposes of :attr:`k_frame`, for the queries: float32, inverted in float64."""
        return inverse_transpose(self.k_frame)

    def tensors(self, framed_layers: Iterable[int]) -> dict[str, np.ndarray]:
        """What an engine file holds of it: the center of each layer, and the frames of some, by their names."""
        found = {k_center_name(i): center for i, center in enumerate(self.k_center)}
        for i in framed_layers:
            found |= {k_frame_name(i): self.k_frame[i], q_frame_name(i): self.q_frame[i]}
        return found

    def describe(self) -> str:
        """What it holds, in a line."""
        return (
            f"keys centered by up to {np.abs(self.k_center).max():.3g}; frames of keys, queries and values, from "
            f"{self.num_tokens:,} tokens"
        )

    def check(self, checkpoint: Checkpoint) -> None:
        """Reject another model.

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
        tensors = {"k_center": self.k_center, "k_frame": self.k_frame, "v_frame": self.v_frame}
        tensors |= {f"probe.{name}": sample for name, sample in self.probe.items()}
        metadata = {"format": _FORMAT, "model": json.dumps(self.shape)}
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
            stored = metadata["format"]
            if stored == "saw_trtllm calibration 1":
                raise ConfigError(f"{path} is of an earlier release, before frames: run saw-calibrate again")
            if stored != _FORMAT:
                raise ValueError(f"its format is {stored!a}")
            k_center, k_frame, v_frame = (tensors.pop(name) for name in ("k_center", "k_frame", "v_frame"))
            fields, num_tokens = json.loads(metadata["model"]), int(metadata["num_tokens"])
            shape = {key: fields[key] for key in _SHAPE}
            layers, heads, dim = (shape[k] for k in ("num_hidden_layers", "num_key_value_heads", "head_size"))
        except (OSError, SafetensorError, KeyError, ValueError, TypeError) as e:
            raise ConfigError(f"{path} cannot be read as a calibration ({e}): write it anew with saw-calibrate") from e
        found = [x.shape for x in (k_center, k_frame, v_frame)]
        finite = all(np.isfinite(x).all() for x in (k_center, k_frame, v_frame, *tensors.values()))
        due = [(layers, heads, dim), *[(layers, heads, dim, dim)] * 2]
        if found != due or not finite or not all(map(is_invertible, (k_frame, v_frame))):
            raise ConfigError(
                f"{path} is damaged: its centers or frames do not fit its model, or frames have no inverse: write it "
                "anew with saw-calibrate"
            )
        probe = {name.removeprefix("probe."): sample for name, sample in tensors.items()}
        return cls(k_center, k_frame, v_frame, shape, probe, num_tokens)


def inverse_transpose(frames: np.ndarray) -> np.ndarray:
    """float32 of the inverse transposes of ``[..., n, n]``, computed in float64."""
    inverse = np.linalg.inv(frames.astype(np.float64))
    return np.ascontiguousarray(inverse.swapaxes(-1, -2), np.float32)


def is_invertible(frames: np.ndarray) -> bool:
    """Whether fp32 products of all frames ``[..., n, n]`` and of their inverses keep some digits."""
    return bool((np.linalg.cond(frames.astype(np.float64)) < _MAX_CONDITION).all())


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
