"""Rotary position embeddings with the scalings of the supported families.

Formulas: linear (Chen et al., arXiv 2306.15595), yarn (Peng et al., arXiv 2309.00071, section 3), and llama3, as
published with Llama 3.1. All of them change the frequencies only, and yarn also the length of the rotated vectors.
"""

from __future__ import annotations

import math

import numpy as np

from saw_trtllm.errors import ConfigError
from saw_trtllm.model.config import ModelConfig

ROPE_TYPES = ("default", "linear", "llama3", "yarn")
_ROWS_AT_ONCE = 1 << 14


def inverse_frequencies(config: ModelConfig, local: bool = False) -> tuple[np.ndarray, float]:
    """Frequencies of the rotation of each pair, with the scaling applied.

    Parameters
    ----------
    config : ModelConfig
    local : bool
        Of the layers with :meth:`ModelConfig.has_local_rope`, which have no scaling.

    Returns
    -------
    tuple of (numpy.ndarray, float)
        float64 ``[head_size / 2]`` in radians per position, and the factor on cos and sin.
    """
    dim = config.head_size
    base = config.rope_local_base_freq if local and config.rope_local_base_freq is not None else config.rotary_base
    inv_freq = base ** -(np.arange(0, dim, 2, dtype=np.float64) / dim)
    scaling = {} if local else config.rotary_scaling or {}
    rope_type = scaling.get("rope_type", "default")
    if rope_type == "default":
        return inv_freq, 1.0
    if rope_type == "linear":
        return inv_freq / scaling["factor"], 1.0
    if rope_type == "llama3":
        return _llama3(inv_freq, scaling), 1.0
    if rope_type == "yarn":
        return _yarn(inv_freq, scaling, dim, base, config.max_position_embeddings)
    raise ConfigError(f"RoPE scaling {rope_type!r} is not supported: the known types are {', '.join(ROPE_TYPES)}")


def _llama3(inv_freq: np.ndarray, scaling: dict) -> np.ndarray:
    wavelength = 2 * math.pi / inv_freq
    original = scaling["original_max_position_embeddings"]
    low, high = scaling["low_freq_factor"], scaling["high_freq_factor"]
    # 0 for wavelengths beyond original/low (slowed by the factor), 1 below original/high (kept), linear between.
    keep = np.clip((original / wavelength - low) / (high - low), 0.0, 1.0)
    return inv_freq * (keep + (1 - keep) / scaling["factor"])


def _yarn(inv_freq: np.ndarray, scaling: dict, dim: int, base: float, max_positions: int) -> tuple[np.ndarray, float]:
    factor = scaling["factor"]
    original = scaling.get("original_max_position_embeddings") or max_positions

    def pair_that_turns(rotations: float) -> float:
        """Index of the pair that makes so many full turns over the original context."""
        return dim * math.log(original / (rotations * 2 * math.pi)) / (2 * math.log(base))

    low = pair_that_turns(scaling.get("beta_fast") or 32.0)
    high = pair_that_turns(scaling.get("beta_slow") or 1.0)
    if scaling.get("truncate", True):
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, dim - 1)
    ramp = np.clip((np.arange(dim // 2) - low) / max(high - low, 0.001), 0.0, 1.0)

    def length(scale: float, mscale: float = 1.0) -> float:
        return 1.0 if scale <= 1 else 0.1 * mscale * math.log(scale) + 1.0

    attention_factor = scaling.get("attention_factor")
    if attention_factor is None:
        mscale, mscale_all_dim = scaling.get("mscale"), scaling.get("mscale_all_dim")
        if mscale and mscale_all_dim:
            attention_factor = length(factor, mscale) / length(factor, mscale_all_dim)
        else:
            attention_factor = length(factor)
    return inv_freq * (1 - ramp) + inv_freq / factor * ramp, attention_factor


def rotary_cos_sin(config: ModelConfig, num_positions: int, local: bool = False) -> np.ndarray:
    """The table that the engine looks positions up in.

    Parameters
    ----------
    config : ModelConfig
        Gives head size, base and scaling.
    num_positions : int
        Positions 0 .. num_positions - 1.
    local : bool
        As of :func:`inverse_frequencies`.

    Returns
    -------
    numpy.ndarray
        float32 ``[num_positions, head_size / 2, 2]``, the last axis (cos, sin), the scaling's factor in both.
    """
    inv_freq, factor = inverse_frequencies(config, local)
    table = np.empty((num_positions, len(inv_freq), 2), np.float32)
    for start in range(0, num_positions, _ROWS_AT_ONCE):  # so that fp64 takes no memory worth naming
        rows = table[start : start + _ROWS_AT_ONCE]
        angle = np.arange(start, start + len(rows), dtype=np.float64)[:, None] * inv_freq
        rows[:] = np.stack([np.cos(angle), np.sin(angle)], axis=-1) * factor
    return table


def table_bytes(config: ModelConfig, num_positions: int) -> int:
    """Size of :func:`rotary_cos_sin`'s table, or of both where layers have one of their own."""
    return num_positions * config.head_size * 4 * (1 if config.rope_local_base_freq is None else 2)
