"""The model configuration, in the words of TensorRT-LLM's ``pretrained_config``."""

from __future__ import annotations

import gzip
import json
import zlib
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from saw_trtllm.errors import CheckpointError, ConfigError

DTypeName = Literal["float16", "bfloat16", "float32"]

#: Model families by TensorRT-LLM's architecture name. One definition serves them all; the flags of
#: :class:`ModelConfig` (``attn_bias``, ``qk_layernorm``, ``sliding_window``) hold what differs.
ARCHITECTURES = {
    "LlamaForCausalLM": "llama",
    "MistralForCausalLM": "mistral",
    "Qwen2ForCausalLM": "qwen2",
    "Qwen3ForCausalLM": "qwen3",
}
MODELS = tuple(ARCHITECTURES.values())


def check_architecture(name: str, path: Path) -> None:
    """Refuse the checkpoint whose config is at ``path`` if its architecture is none of :data:`ARCHITECTURES`."""
    if name not in ARCHITECTURES:
        raise CheckpointError(
            f"{path} is of architecture {name}, which is not supported: use one of {', '.join(ARCHITECTURES)}"
        )


class Mapping(BaseModel):
    """How the model is spread over ranks."""

    model_config = ConfigDict(extra="allow")

    world_size: int = Field(1, ge=1)
    tp_size: int = Field(1, ge=1)
    pp_size: int = Field(1, ge=1)


class ModelConfig(BaseModel):
    """A decoder's shape. Unknown keys are kept, so that a TensorRT-LLM config survives a round trip."""

    model_config = ConfigDict(extra="allow")

    architecture: str
    dtype: DTypeName = "float16"
    hidden_size: int = Field(gt=0)
    num_hidden_layers: int = Field(gt=0)
    num_attention_heads: int = Field(gt=0)
    num_key_value_heads: int = Field(gt=0)
    head_size: int = Field(gt=0)
    intermediate_size: int = Field(gt=0)
    vocab_size: int = Field(gt=0)
    hidden_act: str = "silu"
    norm_epsilon: float = 1e-5
    position_embedding_type: Literal["rope_gpt_neox"] = "rope_gpt_neox"
    max_position_embeddings: int = Field(gt=0)
    rotary_base: float = 10000.0
    #: Hugging Face's ``rope_scaling`` with the key ``rope_type``: ``linear``, ``llama3`` or ``yarn``.
    rotary_scaling: dict[str, Any] | None = None
    #: Bias on Q, K and V (Qwen2).
    attn_bias: bool = False
    #: RMSNorm over each head of Q and K before RoPE (Qwen3).
    qk_layernorm: bool = False
    #: Tokens that each layer sees, counting the current one; None is all of them.
    sliding_window: list[int | None] | None = None
    share_embedding_table: bool = False
    mapping: Mapping = Field(default_factory=Mapping)
    quantization: dict[str, Any] = Field(default_factory=lambda: {"quant_algo": None, "kv_cache_quant_algo": None})

    @model_validator(mode="after")
    def _check(self) -> ModelConfig:
        if self.num_attention_heads % self.num_key_value_heads:
            raise ValueError(
                f"num_attention_heads {self.num_attention_heads} is not a multiple of "
                f"num_key_value_heads {self.num_key_value_heads}"
            )
        if self.sliding_window is not None and len(self.sliding_window) != self.num_hidden_layers:
            raise ValueError(f"sliding_window names {len(self.sliding_window)} layers of {self.num_hidden_layers}")
        return self

    @property
    def model(self) -> str:
        """The family, one of :data:`MODELS`."""
        return ARCHITECTURES[self.architecture]

    @property
    def num_queries_per_kv(self) -> int:
        """Query heads that share a KV head."""
        return self.num_attention_heads // self.num_key_value_heads

    def window(self, layer: int) -> int | None:
        """Tokens that ``layer`` sees, or None for all."""
        return self.sliding_window[layer] if self.sliding_window is not None else None


def first_error(error: ValidationError) -> str:
    """Pydantic's first complaint as ``field: what is wrong``, for a one-sentence message."""
    e = error.errors()[0]
    where = ".".join(str(p) for p in e["loc"])
    what = e["msg"].removeprefix("Value error, ")
    return f"{where}: {what}" if where else what


def read_json(path: Path, error: type[Exception] = ConfigError) -> dict[str, Any]:
    """Read a JSON object, compressed if the name ends in ``.gz``, or raise ``error`` in one sentence."""
    try:
        data = path.read_bytes()
        value = json.loads((gzip.decompress(data) if path.suffix == ".gz" else data).decode("utf-8"))
    except FileNotFoundError:
        raise error(f"{path} does not exist") from None
    except (OSError, EOFError, zlib.error, UnicodeDecodeError, json.JSONDecodeError) as e:
        raise error(f"{path} cannot be read as JSON: {e}") from e
    if not isinstance(value, dict):
        raise error(f"{path} holds {type(value).__name__}, not a JSON object")
    return value
