"""RoPE settings as checkpoints spell them, brought to one spelling."""

from __future__ import annotations

import math
from pathlib import Path
from typing import TYPE_CHECKING, Any

from saw_trtllm.errors import CheckpointError

if TYPE_CHECKING:
    from saw_trtllm.checkpoint.huggingface import HuggingFaceConfig

#: What each supported type cannot do without.
_REQUIRED = {
    "linear": ("factor",),
    "llama3": ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"),
    "yarn": ("factor", "original_max_position_embeddings"),
}


def rotary_scaling(hf: HuggingFaceConfig, path: Path) -> tuple[float, dict[str, Any] | None]:
    """Take base and scaling from a Hugging Face config: ``rope_theta`` and ``rope_scaling``, or ``rope_parameters``.

    Where several places name a value, the order is that of transformers' ``convert_rope_params_to_dict``.

    Returns
    -------
    base : float
        ``rope_theta``.
    scaling : dict or None
        The other parameters, with ``rope_type`` one of linear, llama3, yarn; None without scaling.

    Raises
    ------
    CheckpointError
        For another type, a missing parameter, or RoPE on a part of the head only.
    """
    given = dict(hf.rope_scaling or hf.rope_parameters or {})
    if any(isinstance(value, dict) for value in given.values()):
        raise CheckpointError(f"{path} sets RoPE parameters per layer type, but one set for all layers is needed")
    base = _positive(given.pop("rope_theta", None) or hf.rope_theta or 10000.0, "rope_theta", path)
    partial = given.pop("partial_rotary_factor", None) or hf.partial_rotary_factor or 1.0
    if partial != 1.0:
        raise CheckpointError(f"{path} sets partial_rotary_factor to {partial}, but only 1.0 is supported")
    if _rope_type(given) in ("llama3", "yarn"):
        original = hf.original_max_position_embeddings or given.get("original_max_position_embeddings")
        given["original_max_position_embeddings"] = original or hf.max_position_embeddings
    return base, normalize_scaling(given, path)


def normalize_scaling(given: dict[str, Any], path: Path) -> dict[str, Any] | None:
    """Check a scaling dict, and spell its type ``rope_type`` (old configs say ``type``); None for the default RoPE."""
    rope_type = _rope_type(given)
    if rope_type in ("default", "none"):
        return None
    if rope_type not in _REQUIRED:
        raise CheckpointError(
            f"{path} asks for RoPE scaling of type {rope_type!r}, which is not supported: use a model with one of "
            f"default, {', '.join(_REQUIRED)}"
        )
    scaling = {key: value for key, value in given.items() if value is not None and key != "type"}
    for key in _REQUIRED[rope_type]:
        if key not in scaling:
            raise CheckpointError(f"{path} asks for {rope_type} RoPE scaling without {key!r}, which it needs")
        _positive(scaling[key], key, path)
    return scaling | {"rope_type": rope_type}


def _rope_type(scaling: dict[str, Any]) -> str:
    return str(scaling.get("rope_type") or scaling.get("type") or "default")


def _positive(value: Any, key: str, path: Path) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < math.inf:
        raise CheckpointError(f"{path} sets {key} to {value!r}, but a number above 0 is needed")
    return float(value)
