"""The model configuration, in the words of TensorRT-LLM's ``pretrained_config``."""

from __future__ import annotations

import math
from typing import Annotated, Any, Literal

import ml_dtypes
import numpy as np
from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from saw_trtllm.errors import first_error

DTypeName = Literal["float16", "bfloat16", "float32"]


#: Far above any published model, and low enough that work for each layer or position ends.
MAX_LAYERS = 1024


MAX_POSITIONS = 1 << 24


#: A scaling's number. The bounds keep a table of cosines finite; a string or a bool is none.
_Number = Annotated[float, Field(gt=1e-6, lt=1e9, strict=True)]


_NumberOrZero = Annotated[float, Field(ge=0, lt=1e9, strict=True)]


_Size = Annotated[int, Field(gt=0, lt=1 << 31)]


_TokenId = Annotated[int, Field(lt=1 << 31, strict=True)]


class Mapping(BaseModel):
    """How the model is spread over ranks."""

    model_config = ConfigDict(extra="allow")

    world_size: int = Field(1, ge=1)
    tp_size: int = Field(1, ge=1)
    pp_size: int = Field(1, ge=1)


class RotaryScaling(BaseModel):
    """A scaled RoPE, in Hugging Face's words and with what transformers takes for a key that is left out."""

    model_config = ConfigDict(extra="allow")

    rope_type: Literal["linear", "llama3", "yarn"]
    factor: _Number
    original_max_position_embeddings: _Number | None = None
    low_freq_factor: _Number | None = None
    high_freq_factor: _Number | None = None
    beta_fast: _NumberOrZero | None = None
    beta_slow: _NumberOrZero | None = None
    mscale: _NumberOrZero | None = None
    mscale_all_dim: _NumberOrZero | None = None
    attention_factor: _Number | None = None
    truncate: bool = Field(True, strict=True)

    @model_validator(mode="after")
    def _check(self) -> RotaryScaling:
        if self.rope_type == "llama3":
            for key in ("low_freq_factor", "high_freq_factor", "original_max_position_embeddings"):
                if getattr(self, key) is None:
                    raise ValueError(f"llama3 scaling needs {key}, which is missing")
            low, high = self.low_freq_factor, self.high_freq_factor
            if low is not None and high is not None and high <= low:
                raise ValueError(
                    f"llama3 scaling needs high_freq_factor {self.high_freq_factor} above low_freq_factor "
                    f"{self.low_freq_factor}"
                )
        return self


class _TokenIds(BaseModel):
    """Keys that a model's config may have; one that it leaves out stays out, which is not the same as null."""

    bos_token_id: _TokenId | None = None
    eos_token_id: _TokenId | list[_TokenId] | None = None
    pad_token_id: _TokenId | None = None


class ModelConfig(BaseModel):
    """A decoder's shape. Unknown keys are kept, so that a TensorRT-LLM config survives a round trip."""

    model_config = ConfigDict(extra="allow")

    architecture: str
    dtype: DTypeName = "float16"
    hidden_size: _Size
    num_hidden_layers: int = Field(gt=0, le=MAX_LAYERS)
    num_attention_heads: _Size
    num_key_value_heads: _Size
    head_size: _Size
    intermediate_size: _Size
    vocab_size: _Size
    #: Of the gated MLP.
    hidden_act: Literal["silu", "gelu_pytorch_tanh"] = "silu"
    norm_epsilon: float = Field(1e-5, gt=0, lt=1)
    position_embedding_type: Literal["rope_gpt_neox"] = "rope_gpt_neox"
    max_position_embeddings: int = Field(gt=0, le=MAX_POSITIONS)
    rotary_base: float = Field(10000.0, gt=1, lt=1e30)
    #: A checked :class:`RotaryScaling` with the keys that were given.
    rotary_scaling: dict[str, Any] | None = None
    #: Bias on Q, K and V (Qwen2).
    attn_bias: bool = False
    #: RMSNorm over each head of Q and K before RoPE (Qwen3).
    qk_layernorm: bool = False
    #: RMSNorm of what attention, and of what the MLP, adds to the residual stream, as well as before them (Gemma 2, 3).
    inter_layernorms: bool = False
    #: The embedding is multiplied by sqrt(hidden_size), rounded to the model's dtype (Gemma).
    scale_embedding: bool = False
    #: Scores are q·k over the square root of it; None is head_size.
    query_pre_attn_scalar: _Number | None = None
    #: Scores, and logits, become ``cap · tanh(x / cap)`` (Gemma 2).
    attn_logit_softcapping: _Number | None = None
    final_logit_softcapping: _Number | None = None
    #: Base of the RoPE, without scaling, of the layers that have a window; None is ``rotary_base`` (Gemma 3).
    rope_local_base_freq: float | None = Field(None, gt=1, lt=1e30)
    #: Tokens that each layer sees, counting the current one; None is all of them.
    sliding_window: list[int | None] | None = None
    share_embedding_table: bool = False
    mapping: Mapping = Field(default_factory=Mapping)
    quantization: dict[str, Any] = Field(default_factory=lambda: {"quant_algo": None, "kv_cache_quant_algo": None})

    @field_validator("rotary_scaling")
    @classmethod
    def _check_scaling(cls, scaling: dict[str, Any] | None) -> dict[str, Any] | None:
        if scaling is not None:
            _validate(RotaryScaling, scaling)
        return scaling

    @model_validator(mode="after")
    def _check(self) -> ModelConfig:
        _validate(_TokenIds, self.model_extra or {})
        if self.num_attention_heads % self.num_key_value_heads:
            raise ValueError(
                f"num_attention_heads {self.num_attention_heads} is not a multiple of "
                f"num_key_value_heads {self.num_key_value_heads}"
            )
        if self.sliding_window is not None and len(self.sliding_window) != self.num_hidden_layers:
            raise ValueError(f"sliding_window names {len(self.sliding_window)} layers of {self.num_hidden_layers}")
        return self

    @property
    def num_queries_per_kv(self) -> int:
        """Query heads that share a KV head."""
        return self.num_attention_heads // self.num_key_value_heads

    @property
    def max_positions(self) -> int:
        """Tokens of the longest sequence: ``max_position_embeddings``, or what linear and yarn scaling stretch it to.

        Published long-context settings leave ``max_position_embeddings`` at the original length, which a factor
        multiplies; vLLM derives its longest sequence so, and transformers sets no limit.
        """
        scaling = self.rotary_scaling or {}
        if scaling.get("rope_type") not in ("linear", "yarn"):
            return self.max_position_embeddings
        original = scaling.get("original_max_position_embeddings") or self.max_position_embeddings
        return max(self.max_position_embeddings, min(int(scaling["factor"] * original), MAX_POSITIONS))

    @property
    def softmax_scale(self) -> float:
        """Factor on q·k."""
        return 1 / math.sqrt(self.query_pre_attn_scalar or self.head_size)

    @property
    def embedding_scale(self) -> float:
        """Factor on the embedding, rounded as transformers' classes round it: to float32, then to the model's dtype."""
        if not self.scale_embedding:
            return 1.0
        return float(np.float32(self.hidden_size**0.5).astype(np.dtype(getattr(ml_dtypes, self.dtype, self.dtype))))

    def of_rank(self, tp_size: int) -> ModelConfig:
        """What one of ``tp_size`` ranks computes: its heads, and its share of the MLP's inner features.

        Where there are fewer KV heads than ranks, several ranks have the same one.
        """
        if tp_size == 1:
            return self
        share = {
            "num_attention_heads": self.num_attention_heads // tp_size,
            "num_key_value_heads": max(1, self.num_key_value_heads // tp_size),
            "intermediate_size": self.intermediate_size // tp_size,
        }
        return self.model_copy(update=share)

    def window(self, layer: int) -> int | None:
        """Tokens that ``layer`` sees, or None for all."""
        return self.sliding_window[layer] if self.sliding_window is not None else None

    def has_local_rope(self, layer: int) -> bool:
        """Whether ``layer`` turns by ``rope_local_base_freq``."""
        return self.rope_local_base_freq is not None and self.window(layer) is not None


def _validate(model: type[BaseModel], values: dict[str, Any]) -> None:
    """Check values within another model's validator, which takes a one-line ValueError."""
    try:
        model.model_validate(values)
    except ValidationError as e:
        raise ValueError(first_error(e)) from None
