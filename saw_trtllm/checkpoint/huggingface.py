"""Hugging Face's side: ``config.json`` to :class:`ModelConfig`, and its tensor names by TensorRT-LLM's."""

from __future__ import annotations

import logging
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from pydantic import ValidationError

from saw_trtllm.checkpoint.config_keys import honored
from saw_trtllm.checkpoint.families import family_of, find_family
from saw_trtllm.checkpoint.layout import EMBEDDING, FINAL_NORM, LM_HEAD, expected_shapes
from saw_trtllm.checkpoint.quantization import CACHE_SCALES, Linear, StoredWeight, find_dialect, named_dialect
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
from saw_trtllm.model.quantization import fused_format

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


def read(
    folder: Path, raw: dict[str, Any]
) -> tuple[ModelConfig, dict[str, list[StoredTensor]], dict[str, list[StoredWeight]]]:
    """Read a folder's config and headers.

    Returns
    -------
    config : ModelConfig
    parts : dict[str, list[StoredTensor]]
        By TensorRT-LLM's name, the tensors that concatenated along dimension 0 make it up, without a tied ``lm_head``.
    quantized : dict[str, list[StoredWeight]]
        The same of the weights that are quantized.
    """
    path = folder / "config.json"
    config = read_config(raw, path)
    dialect = find_dialect(folder, raw)
    stored, absent = open_huggingface(folder)
    tensors = stored.values()
    if dialect is None:
        reject_quantized(tensors)
    parts: dict[str, list[StoredTensor]] = {}
    quantized: dict[str, list[StoredWeight]] = {}
    for name, shape in _needed(config, stored):
        sources = _sources(name, shape, config)
        found = [] if dialect is None else _quantized_parts(name, sources, dialect[1], stored, folder)
        if found:
            quantized[name] = found
        else:
            parts[name] = _stored_parts(sources, config, stored, absent, folder)
    used = {part.name for found in parts.values() for part in found}
    if dialect is not None:
        if not quantized:
            raise CheckpointError(
                f"{folder} says that its weights are quantized by {dialect[0].name!r} and holds no such weight: use "
                "the config.json that belongs to these weights"
            )
        used |= {part.name for found in quantized.values() for weight in found for part in weight.tensors}
        layers = {weight.name for found in quantized.values() for weight in found}
        used |= {t.name for t in tensors if CACHE_SCALES.search(t.name) or _is_zero_bias(t, layers)}
        reject_quantized(tensors, used)
    reject_unknown(tensors, used, _HARMLESS, f"{config.architecture} of {config.num_hidden_layers} layers")
    if config.share_embedding_table and LM_HEAD in parts:
        # Transformers ties a head that is stored nevertheless only if it equals the embedding.
        if _equal(parts[LM_HEAD][0], parts[EMBEDDING][0]):
            del parts[LM_HEAD]
        else:
            log.warning("%s says tie_word_embeddings, but lm_head.weight differs from the embedding: not tied", path)
            config = config.model_copy(update={"share_embedding_table": False})
    if _dtype(raw) is None:
        config = config.model_copy(update={"dtype": parts[EMBEDDING][0].dtype})
    return config, parts, quantized


def read_config(raw: dict[str, Any], path: Path) -> ModelConfig:
    """Translate a Hugging Face ``config.json``; ``path`` is for the error messages."""
    # First of all: another architecture's config has other keys, and the lack of ours would be the wrong complaint.
    architectures = raw.get("architectures")
    family = find_family(str(architectures[0]) if isinstance(architectures, list) and architectures else "none", path)
    named_dialect(raw, path)
    try:
        hf = family.config(**honored(raw, family, path))
    except ValidationError as e:
        raise CheckpointError(f"{path}: {first_error(e)}") from None
    try:
        return ModelConfig(**{**family.fields(hf, path), **family.fixed, "dtype": _dtype(raw) or "float32"})
    except ValidationError as e:
        field, _, what = first_error(e).partition(":")
        raise CheckpointError(f"{path}: {_THEIR_WORDS.get(field, field)}:{what}") from None


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


def _sources(name: str, shape: tuple[int, ...], config: ModelConfig) -> dict[str, tuple[int, ...]]:
    """The stored tensors that make up ``name``, with their shapes."""
    sources = _their_names(name, config)
    kv_rows = config.num_key_value_heads * config.head_size
    rows = [shape[0]] if len(sources) == 1 else [shape[0] - 2 * kv_rows, kv_rows, kv_rows]
    return {source: (n, *shape[1:]) for source, n in zip(sources, rows, strict=True)}


def _quantized_parts(
    name: str,
    sources: dict[str, tuple[int, ...]],
    read_linear: Callable[[Linear], StoredWeight | None],
    stored: dict[str, StoredTensor],
    folder: Path,
) -> list[StoredWeight]:
    """The quantized weights that make up ``name``; none if it is not quantized."""
    if name == EMBEDDING or not all(len(shape) == 2 for shape in sources.values()):
        return []
    linears = [Linear(n.removesuffix(".weight"), shape, stored, folder) for n, shape in sources.items()]
    found = [read_linear(linear) for linear in linears]
    weights = [weight for weight in found if weight is not None]
    if weights and len(weights) < len(found):
        odd = linears[found.index(None)].name
        raise CheckpointError(
            f"{folder} has {weights[0].name!r} quantized and {odd!r} not, which are one layer of an engine: use a "
            "model in which queries, keys and values are quantized alike"
        )
    if weights and fused_format([w.format for w in weights], [w.shape for w in weights]) is None:
        raise CheckpointError(
            f"{folder} has {' and '.join(repr(w.name) for w in weights)} quantized in different ways, which are one "
            "layer of an engine: use a model in which queries, keys and values are quantized alike"
        )
    return weights


def _is_zero_bias(tensor: StoredTensor, layers: set[str]) -> bool:
    """Whether a tensor is the bias that AutoGPTQ gives every layer, and that is nothing where the model has none."""
    name = tensor.name.removesuffix(".bias")
    return name != tensor.name and name in layers and tensor.dtype in NUMPY_DTYPES and not tensor.load().any()


def _stored_parts(
    sources: dict[str, tuple[int, ...]],
    config: ModelConfig,
    stored: dict[str, StoredTensor],
    absent: dict[str, str],
    folder: Path,
) -> list[StoredTensor]:
    """Look up stored tensors, and check their shapes."""
    parts = []
    for source, shape in sources.items():
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
        stored[source].check(shape)
        parts.append(stored[source])
    check_dtypes(parts)
    return parts


def _equal(a: StoredTensor, b: StoredTensor, rows: int = 4096) -> bool:
    """Compare two tensors piece by piece, so that neither has to be in memory whole."""
    pieces = [slice(i, min(i + rows, a.shape[0])) for i in range(0, a.shape[0], rows)]
    return all(np.array_equal(a.load()[piece], b.load()[piece]) for piece in pieces)
