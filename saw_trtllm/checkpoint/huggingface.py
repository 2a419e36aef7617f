"""Hugging Face's side: ``config.json`` to :class:`ModelConfig`, and its tensor names by TensorRT-LLM's."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any, Literal

import numpy as np
from pydantic import AliasChoices, BaseModel, Field, ValidationError

from saw_trtllm.checkpoint.layout import EMBEDDING, FINAL_NORM, LM_HEAD, expected_shapes
from saw_trtllm.checkpoint.reader import NUMPY_DTYPES, StoredTensor, open_huggingface
from saw_trtllm.checkpoint.rope_scaling import rotary_scaling
from saw_trtllm.config import ARCHITECTURES, ModelConfig, check_architecture, first_error
from saw_trtllm.errors import CheckpointError

log = logging.getLogger(__name__)

_LAYER_NAMES = {
    "input_layernorm.weight": ("input_layernorm.weight",),
    "attention.qkv.weight": ("self_attn.q_proj.weight", "self_attn.k_proj.weight", "self_attn.v_proj.weight"),
    "attention.qkv.bias": ("self_attn.q_proj.bias", "self_attn.k_proj.bias", "self_attn.v_proj.bias"),
    "attention.q_layernorm.weight": ("self_attn.q_norm.weight",),
    "attention.k_layernorm.weight": ("self_attn.k_norm.weight",),
    "attention.dense.weight": ("self_attn.o_proj.weight",),
    "post_layernorm.weight": ("post_attention_layernorm.weight",),
    # TensorRT-LLM's gated MLP is proj(act(fc(x)) * gate(x)): its fc is what Hugging Face calls gate_proj.
    "mlp.fc.weight": ("mlp.gate_proj.weight",),
    "mlp.gate.weight": ("mlp.up_proj.weight",),
    "mlp.proj.weight": ("mlp.down_proj.weight",),
}
_NAMES = {
    EMBEDDING: "model.embed_tokens.weight",
    FINAL_NORM: "model.norm.weight",
    LM_HEAD: "lm_head.weight",
}
_TOKEN_IDS = ("bos_token_id", "eos_token_id", "pad_token_id")


class HuggingFaceConfig(BaseModel):
    """What is read of a Hugging Face ``config.json``, with transformers' own defaults for what it leaves out."""

    architectures: list[str] | None
    dtype: str | None = Field(None, validation_alias=AliasChoices("dtype", "torch_dtype"))
    hidden_size: int = Field(gt=0)
    num_hidden_layers: int = Field(gt=0)
    num_attention_heads: int = Field(gt=0)
    num_key_value_heads: int | None = None
    head_dim: int | None = None
    intermediate_size: int
    vocab_size: int
    max_position_embeddings: int
    rms_norm_eps: float = 1e-6
    tie_word_embeddings: bool = False
    hidden_act: str = "silu"
    attention_bias: bool = False
    mlp_bias: bool = False
    rope_theta: float | None = None
    rope_scaling: dict[str, Any] | None = None
    rope_parameters: dict[str, Any] | None = None
    partial_rotary_factor: float | None = None
    original_max_position_embeddings: int | None = None
    use_sliding_window: bool = False
    sliding_window: int | None = Field(4096, gt=0)
    max_window_layers: int = 28
    layer_types: list[Literal["full_attention", "sliding_attention"]] | None = None
    quantization_config: dict[str, Any] | None = None
    bos_token_id: int | None = None
    eos_token_id: int | list[int] | None = None
    pad_token_id: int | None = None


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
    stored = open_huggingface(folder)
    parts = {name: _stored_parts(name, shape, config, stored, folder) for name, shape in _needed(config, stored)}
    if config.share_embedding_table and LM_HEAD in parts:
        # Transformers ties a head that is stored nevertheless only if it equals the embedding.
        if _equal(parts[LM_HEAD][0], parts[EMBEDDING][0]):
            del parts[LM_HEAD]
        else:
            log.warning("%s says tie_word_embeddings, but lm_head.weight differs from the embedding: not tied", path)
            config = config.model_copy(update={"share_embedding_table": False})
    if raw.get("dtype") not in NUMPY_DTYPES and raw.get("torch_dtype") not in NUMPY_DTYPES:
        config = config.model_copy(update={"dtype": parts[EMBEDDING][0].dtype})
    return config, parts


def read_config(raw: dict[str, Any], path: Path) -> ModelConfig:
    """Translate a Hugging Face ``config.json``; ``path`` is for the error messages."""
    # First of all: another architecture's config has other keys, and the lack of ours would be the wrong complaint.
    architectures = raw.get("architectures")
    check_architecture(str(architectures[0]) if isinstance(architectures, list) and architectures else "none", path)
    try:
        hf = HuggingFaceConfig(**raw)
    except ValidationError as e:
        raise CheckpointError(f"{path}: {first_error(e)}") from None
    _refuse_unsupported(hf, path)
    architecture = hf.architectures[0]
    default_head_dim = 128 if architecture == "Qwen3ForCausalLM" else hf.hidden_size // hf.num_attention_heads
    base, scaling = rotary_scaling(hf, path)
    try:
        return ModelConfig(
            architecture=architecture,
            dtype=hf.dtype if hf.dtype in NUMPY_DTYPES else "float32",
            hidden_size=hf.hidden_size,
            num_hidden_layers=hf.num_hidden_layers,
            num_attention_heads=hf.num_attention_heads,
            num_key_value_heads=hf.num_key_value_heads or hf.num_attention_heads,
            head_size=hf.head_dim or default_head_dim,
            intermediate_size=hf.intermediate_size,
            vocab_size=hf.vocab_size,
            max_position_embeddings=hf.max_position_embeddings,
            hidden_act=hf.hidden_act,
            norm_epsilon=hf.rms_norm_eps,
            rotary_base=base,
            rotary_scaling=scaling,
            attn_bias=architecture == "Qwen2ForCausalLM",
            qk_layernorm=architecture == "Qwen3ForCausalLM",
            sliding_window=_sliding_window(hf, path),
            share_embedding_table=hf.tie_word_embeddings,
            **{key: getattr(hf, key) for key in _TOKEN_IDS if getattr(hf, key) is not None},
        )
    except ValidationError as e:
        raise CheckpointError(f"{path}: {first_error(e)}") from None


def _refuse_unsupported(hf: HuggingFaceConfig, path: Path) -> None:
    if hf.quantization_config:
        method = hf.quantization_config.get("quant_method", "unknown method")
        raise CheckpointError(f"{path} is of a quantized model ({method}): use the fp16, bf16 or fp32 weights instead")
    if hf.hidden_act != "silu":
        raise CheckpointError(f"{path} sets hidden_act to {hf.hidden_act!r}, but only 'silu' is supported")
    # Biases beyond those of Q, K and V, which Llama's and Qwen3's configs can ask for.
    for key in ("attention_bias", "mlp_bias"):
        if getattr(hf, key):
            raise CheckpointError(f"{path} sets {key}, which is not supported: use a model without it")


def _sliding_window(hf: HuggingFaceConfig, path: Path) -> list[int | None] | None:
    """Window of each layer, or None if no layer has one.

    Transformers' mask keeps ``kv_idx > q_idx - sliding_window`` (``masking_utils.sliding_window_overlay``): a query
    sees that many tokens, itself among them, which is what :attr:`ModelConfig.sliding_window` says too.
    """
    layers, family = hf.num_hidden_layers, ARCHITECTURES[hf.architectures[0]]
    if family == "mistral":
        sliding = [True] * layers
    elif family in ("qwen2", "qwen3") and hf.use_sliding_window:
        sliding = [i >= hf.max_window_layers for i in range(layers)]
        if hf.layer_types is not None:
            sliding = [kind == "sliding_attention" for kind in hf.layer_types]
    else:
        return None
    if len(sliding) != layers:
        raise CheckpointError(
            f"{path} names {len(sliding)} layer_types for {layers} layers, but one for each is needed"
        )
    return [hf.sliding_window if s else None for s in sliding] if hf.sliding_window and any(sliding) else None


def _needed(config: ModelConfig, stored: dict[str, StoredTensor]) -> list[tuple[str, tuple[int, ...]]]:
    shapes = expected_shapes(config)
    if config.share_embedding_table and _NAMES[LM_HEAD] not in stored:
        del shapes[LM_HEAD]
    return list(shapes.items())


def _stored_parts(
    name: str, shape: tuple[int, ...], config: ModelConfig, stored: dict[str, StoredTensor], folder: Path
) -> list[StoredTensor]:
    """Look up the stored tensors that make up ``name``, and check their shapes."""
    if name in _NAMES:
        sources, rows = [_NAMES[name]], [shape[0]]
    else:
        _, _, layer, kind = name.split(".", 3)
        sources = [f"model.layers.{layer}.{source}" for source in _LAYER_NAMES[kind]]
        kv_rows = config.num_key_value_heads * config.head_size
        rows = [shape[0]] if len(sources) == 1 else [shape[0] - 2 * kv_rows, kv_rows, kv_rows]
    parts = []
    for source, n in zip(sources, rows, strict=True):
        if source not in stored:
            raise CheckpointError(
                f"{folder} lacks the tensor {source!r}, which a {config.architecture} of {config.num_hidden_layers} "
                "layers needs: download the weights again"
            )
        stored[source].check((n, *shape[1:]))
        parts.append(stored[source])
    return parts


def _equal(a: StoredTensor, b: StoredTensor, rows: int = 4096) -> bool:
    """Compare two tensors piece by piece, so that neither has to be in memory whole."""
    pieces = [slice(i, min(i + rows, a.shape[0])) for i in range(0, a.shape[0], rows)]
    return all(np.array_equal(a.load(piece), b.load(piece)) for piece in pieces)
