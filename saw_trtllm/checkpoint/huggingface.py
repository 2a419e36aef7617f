"""Hugging Face's side: ``config.json`` to :class:`ModelConfig`, and its tensor names by TensorRT-LLM's."""

from __future__ import annotations

import logging
import re
from pathlib import Path
from typing import Any

import numpy as np
from pydantic import ValidationError

from saw_trtllm.checkpoint.config_keys import honored
from saw_trtllm.checkpoint.families import family_of, find_family
from saw_trtllm.checkpoint.layout import EMBEDDING, FINAL_NORM, LM_HEAD, expected_shapes
from saw_trtllm.checkpoint.reader import (
    NUMPY_DTYPES,
    StoredTensor,
    check_dtypes,
    open_huggingface,
    reject_quantized,
    reject_unknown,
)
from saw_trtllm.errors import CheckpointError, first_error
from saw_trtllm.model.config import ModelConfig

log = logging.getLogger(__name__)

_NAMES = {
    EMBEDDING: "model.embed_tokens.weight",
    FINAL_NORM: "model.norm.weight",
    LM_HEAD: "lm_head.weight",
}
#: What exports of older transformers stored beside the weights, and its classes compute themselves.
_HARMLESS = re.compile(r"\brotary_emb\.(original_)?(inv_freq|cos_cached|sin_cached)$")
#: What our words for some fields are in a Hugging Face config.
_THEIR_WORDS = {
    "norm_epsilon": "rms_norm_eps",
    "rotary_base": "rope_theta",
    "rotary_scaling": "rope_scaling",
    "head_size": "head_dim",
}


def read(folder: Path, raw: dict[str, Any]) -> tuple[ModelConfig, dict[str, list[StoredTensor]]]:
    """Read a folder's config and headers.

    Returns
    -------
    config : ModelConfig
    parts : dict[str, list[StoredTensor]]
        By TensorRT-LLM's name, the tensors that concatenated along dimension 0 make it up, without a tied ``lm_head``.
    """
    path = folder / "config.json"
    config = read_config(raw, path)
    stored, absent = open_huggingface(folder)
    tensors = stored.values()
    reject_quantized(tensors)
    parts = {n: _stored_parts(n, shape, config, stored, absent, folder) for n, shape in _needed(config, stored)}
    model = f"{config.architecture} of {config.num_hidden_layers} layers"
    reject_unknown(tensors, {part.name for found in parts.values() for part in found}, _HARMLESS, model)
    if config.share_embedding_table and LM_HEAD in parts:
        # Transformers ties a head that is stored nevertheless only if it equals the embedding.
        if _equal(parts[LM_HEAD][0], parts[EMBEDDING][0]):
            del parts[LM_HEAD]
        else:
            log.warning("%s says tie_word_embeddings, but lm_head.weight differs from the embedding: not tied", path)
            config = config.model_copy(update={"share_embedding_table": False})
    if _dtype(raw) is None:
        config = config.model_copy(update={"dtype": parts[EMBEDDING][0].dtype})
    return config, parts


def read_config(raw: dict[str, Any], path: Path) -> ModelConfig:
    """Translate a Hugging Face ``config.json``; ``path`` is for the error messages."""
    # First of all: another architecture's config has other keys, and the lack of ours would be the wrong complaint.
    architectures = raw.get("architectures")
    family = find_family(str(architectures[0]) if isinstance(architectures, list) and architectures else "none", path)
    _reject_quantized_model(raw, path)
    try:
        hf = family.config(**honored(raw, family, path))
    except ValidationError as e:
        raise CheckpointError(f"{path}: {first_error(e)}") from None
    try:
        return ModelConfig(**{**family.fields(hf, path), **family.fixed, "dtype": _dtype(raw) or "float32"})
    except ValidationError as e:
        field, _, what = first_error(e).partition(":")
        raise CheckpointError(f"{path}: {_THEIR_WORDS.get(field, field)}:{what}") from None


def _reject_quantized_model(raw: dict[str, Any], path: Path) -> None:
    quantization = raw.get("quantization_config")
    if isinstance(quantization, dict) and quantization:
        method = quantization.get("quant_method", "unknown method")
        raise CheckpointError(
            f"{path} has a quantization_config ({method}), and quantized checkpoints are not supported yet: use the "
            "fp16, bf16 or fp32 weights instead"
        )


def _dtype(raw: dict[str, Any]) -> str | None:
    """The dtype that a config names, ``dtype`` before its old name, if it is one that weights can have here."""
    name = raw.get("dtype") if raw.get("dtype") is not None else raw.get("torch_dtype")
    return name if isinstance(name, str) and name in NUMPY_DTYPES else None


def _needed(config: ModelConfig, stored: dict[str, StoredTensor]) -> list[tuple[str, tuple[int, ...]]]:
    shapes = expected_shapes(config)
    if config.share_embedding_table and _NAMES[LM_HEAD] not in stored:
        del shapes[LM_HEAD]
    return list(shapes.items())


def _their_names(name: str, config: ModelConfig) -> list[str]:
    """The stored tensors that make one up."""
    if name in _NAMES:
        return [_NAMES[name]]
    _, _, layer, kind = name.split(".", 3)
    return [f"model.layers.{layer}.{source}" for source in family_of(config).layer_names[kind]]


def _stored_parts(
    name: str,
    shape: tuple[int, ...],
    config: ModelConfig,
    stored: dict[str, StoredTensor],
    absent: dict[str, str],
    folder: Path,
) -> list[StoredTensor]:
    """Look up the stored tensors that make up ``name``, and check their shapes."""
    sources = _their_names(name, config)
    kv_rows = config.num_key_value_heads * config.head_size
    rows = [shape[0]] if len(sources) == 1 else [shape[0] - 2 * kv_rows, kv_rows, kv_rows]
    parts = []
    for source, n in zip(sources, rows, strict=True):
        if source in absent:
            raise CheckpointError(
                f"{folder / 'model.safetensors.index.json'} says that {source!r} is in {absent[source]}, which does "
                "not hold it: download both again"
            )
        if source not in stored:
            raise CheckpointError(
                f"{folder} lacks the tensor {source!r}, which a {config.architecture} of {config.num_hidden_layers} "
                "layers needs: download the weights again"
            )
        stored[source].check((n, *shape[1:]))
        parts.append(stored[source])
    check_dtypes(parts)
    return parts


def _equal(a: StoredTensor, b: StoredTensor, rows: int = 4096) -> bool:
    """Compare two tensors piece by piece, so that neither has to be in memory whole."""
    pieces = [slice(i, min(i + rows, a.shape[0])) for i in range(0, a.shape[0], rows)]
    return all(np.array_equal(a.load()[piece], b.load()[piece]) for piece in pieces)
