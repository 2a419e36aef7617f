"""What a family of models says of itself, and what several of them say in the same words."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from saw_trtllm.checkpoint.huggingface_config import HuggingFaceConfig
from saw_trtllm.checkpoint.rope_scaling import rotary_scaling
from saw_trtllm.errors import CheckpointError
from saw_trtllm.model.config import ModelConfig

Treatment = Literal["honored", "rejected", "harmless"]

OFF = (None, False)
_TOKEN_IDS = ("bos_token_id", "eos_token_id", "pad_token_id")


@dataclass(frozen=True)
class KeyRule:
    """How some keys of a Hugging Face ``config.json`` are treated.

    Attributes
    ----------
    treatment : str
    note : str
        What it does or why it does nothing, for the table.
    keys : tuple of str
    unless : tuple
        Values of rejected keys that change nothing.
    """

    treatment: Treatment
    note: str
    keys: tuple[str, ...]
    unless: tuple[Any, ...] = ()


@dataclass(frozen=True)
class Family:
    """A family: what its configuration means, what its weights are called, and what of it is rejected.

    One decoder serves all families; the fields of :class:`~saw_trtllm.model.config.ModelConfig` hold what differs.

    Attributes
    ----------
    name : str
        As ``--model`` takes it.
    architecture : str
        Its class in transformers, and TensorRT-LLM's name of it.
    config : type
        What is read of a Hugging Face config, with the class's own defaults.
    fields : callable
        Fields of ``ModelConfig`` of such a config; the path is for error messages.
    layer_names : dict
        Of each of TensorRT-LLM's tensors of a layer, the Hugging Face tensors that make it up, concatenated.
    keys : tuple of KeyRule
        Beside those that all families have; a key of another family is harmless.
    fixed : dict
        Fields of ``ModelConfig`` that all its models have.
    norm_offset : float
        What Hugging Face's weights of norms lack: Gemma's norms multiply by 1 + w.
    trtllm_fields : callable
        Fields of ``ModelConfig`` that its TensorRT-LLM config spells in another way; the path is for error messages.
    trtllm_class : str
        Of :mod:`saw_trtllm.backends.tensorrt_llm.models`.
    trtllm_rejects : tuple of str
        Keys that its TensorRT-LLM config may not set.
    trtllm_writes : callable
        Keys that TensorRT-LLM's definition of it asks for, unless the model's config has them.
    """

    name: str
    architecture: str
    config: type[HuggingFaceConfig]
    fields: Callable[[Any, Path], dict[str, Any]]
    layer_names: Mapping[str, tuple[str, ...]]
    keys: tuple[KeyRule, ...]
    trtllm_class: str
    fixed: Mapping[str, Any] = field(default_factory=dict)
    trtllm_rejects: tuple[str, ...] = ()
    norm_offset: float = 0.0
    trtllm_fields: Callable[[dict[str, Any], Path], dict[str, Any]] = lambda raw, path: {}
    trtllm_writes: Callable[[ModelConfig], dict[str, Any]] = lambda config: {}


def decoder_fields(hf: HuggingFaceConfig, path: Path) -> dict[str, Any]:
    """What all families' configs mean in ``ModelConfig``'s words."""
    base, scaling = rotary_scaling(hf, path)
    heads = hf.num_attention_heads
    return {
        "architecture": hf.architectures[0],
        "hidden_size": hf.hidden_size,
        "num_hidden_layers": hf.num_hidden_layers,
        "num_attention_heads": heads,
        "num_key_value_heads": heads if hf.num_key_value_heads is None else hf.num_key_value_heads,
        "head_size": hf.hidden_size // heads if hf.head_dim is None else hf.head_dim,
        "intermediate_size": hf.intermediate_size,
        "vocab_size": hf.vocab_size,
        "max_position_embeddings": hf.max_position_embeddings,
        "norm_epsilon": hf.rms_norm_eps,
        "rotary_base": base,
        "rotary_scaling": scaling,
        "share_embedding_table": hf.tie_word_embeddings,
        **{key: getattr(hf, key) for key in _TOKEN_IDS if getattr(hf, key) is not None},
    }


def layer_types(given: Sequence[str], num_layers: int, path: Path) -> list[bool]:
    """Whether each layer has a sliding window, by ``layer_types``."""
    odd = next((kind for kind in given if kind not in ("full_attention", "sliding_attention")), None)
    if odd is not None:
        raise CheckpointError(
            f"{path} has {odd!r} among its layer_types, but full_attention and sliding_attention are supported"
        )
    if len(given) != num_layers:
        raise CheckpointError(
            f"{path} names {len(given)} layer_types for {num_layers} layers, but one for each is needed"
        )
    return [kind == "sliding_attention" for kind in given]


def windows(size: int | None, sliding: Sequence[bool], path: Path) -> list[int | None] | None:
    """Window of each layer, or None if no layer has one.

    Transformers' mask keeps ``kv_idx > q_idx - sliding_window`` (``masking_utils.sliding_window_overlay``): a query
    sees that many tokens, itself among them, which is what :attr:`ModelConfig.sliding_window` says too.
    """
    if size is None or not any(sliding):
        return None
    if size < 1:
        raise CheckpointError(f"{path} sets sliding_window to {size}, but at least 1 is needed")
    return [size if s else None for s in sliding]


def silu(name: str, path: Path) -> str:
    """The activation of a family that has no other."""
    if name not in ("silu", "swish"):
        raise CheckpointError(f"{path} sets hidden_act to {name!r}, but only 'silu' is supported")
    return "silu"
