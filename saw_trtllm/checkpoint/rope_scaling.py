"""RoPE settings as checkpoints spell them, brought to one spelling."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from saw_trtllm.errors import CheckpointError

if TYPE_CHECKING:
    from saw_trtllm.checkpoint.huggingface_config import HuggingFaceConfig

SCALINGS = ("linear", "llama3", "yarn")


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
        For another type, or RoPE on a part of the head only.
    """
    given = dict(hf.rope_scaling or hf.rope_parameters or {})
    if any(isinstance(value, dict) for value in given.values()):
        raise CheckpointError(f"{path} sets RoPE parameters per layer type, but one set for all layers is needed")
    base = _first(given.pop("rope_theta", None), hf.rope_theta, 10000.0)
    partial = _first(given.pop("partial_rotary_factor", None), hf.partial_rotary_factor, 1.0)
    if partial != 1.0:
        raise CheckpointError(f"{path} sets partial_rotary_factor to {partial}, but only 1.0 is supported")
    if _rope_type(given) in ("llama3", "yarn"):
        given["original_max_position_embeddings"] = _first(
            hf.original_max_position_embeddings,
            given.get("original_max_position_embeddings"),
            hf.max_position_embeddings,
        )
    return base, normalize_scaling(given, path)


def normalize_scaling(given: dict[str, Any], path: Path) -> dict[str, Any] | None:
    """Spell a scaling's type ``rope_type`` (old configs say ``type``), without nulls; None for the default RoPE.

    :class:`~saw_trtllm.model.config.RotaryScaling` checks the parameters.
    """
    rope_type = _rope_type(given)
    if rope_type in ("default", "none"):
        return None
    if rope_type not in SCALINGS:
        raise CheckpointError(
            f"{path} asks for RoPE scaling of type {rope_type!r}, which is not supported: use a model with one of "
            f"default, {', '.join(SCALINGS)}"
        )
    scaling = {key: value for key, value in given.items() if value is not None and key != "type"}
    return scaling | {"rope_type": rope_type}


def _first(*values: Any) -> Any:
    """The first that is given: 0 is given, and wrong."""
    return next(value for value in values if value is not None)


def _rope_type(scaling: dict[str, Any]) -> str:
    return str(scaling.get("rope_type") or scaling.get("type") or "default")
