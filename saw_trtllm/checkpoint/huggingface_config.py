"""A Hugging Face folder's ``config.json``."""

from __future__ import annotations

from typing import Any

from pydantic import BaseModel, ConfigDict, Field

from saw_trtllm.model.config import MAX_LAYERS


class HuggingFaceConfig(BaseModel):
    """What is read of every family's ``config.json``, with transformers' own defaults for what it leaves out.

    A family's file adds what its class reads beside it, and the defaults that are its own.
    """

    model_config = ConfigDict(strict=True)

    architectures: list[str]
    dtype: str | None = None
    torch_dtype: str | None = None
    hidden_size: int = Field(gt=0)
    num_hidden_layers: int = Field(gt=0, le=MAX_LAYERS)
    num_attention_heads: int = Field(gt=0)
    num_key_value_heads: int | None = None
    head_dim: int | None = None
    intermediate_size: int
    vocab_size: int
    max_position_embeddings: int
    rms_norm_eps: float = 1e-6
    tie_word_embeddings: bool = False
    rope_theta: float | None = None
    rope_scaling: dict[str, Any] | None = None
    rope_parameters: dict[str, Any] | None = None
    partial_rotary_factor: float | None = None
    original_max_position_embeddings: int | None = None
    quantization_config: dict[str, Any] | None = None
    compression_config: dict[str, Any] | None = None
    bos_token_id: int | None = None
    eos_token_id: int | list[int] | None = None
    pad_token_id: int | None = None
