"""What a step of an engine may hold: limits in ``trtllm-build``'s words, and how they bound one another."""

from __future__ import annotations

from typing import Any, Literal, NamedTuple

from pydantic import BaseModel, ConfigDict, Field, model_validator

from saw_trtllm.format import TOKENS_PER_BLOCK
from saw_trtllm.model.config import MAX_POSITIONS

#: Tokens of a prefill chunk where no other number is asked for, at most. Long enough to fill a GPU's matrix units,
#: short enough that decodes beside it do not stall, and the grain in which a 4-bit cache's prefixes are reused where
#: the text must be deterministic.
PREFILL_CHUNK = 512


class PluginConfig(BaseModel):
    """TensorRT-LLM's plugin switches: those that its executor reads, with the values that a SAW engine has."""

    model_config = ConfigDict(extra="allow")

    gpt_attention_plugin: str = "auto"
    remove_input_padding: bool = True
    paged_kv_cache: bool = True
    tokens_per_block: int = 32
    context_fmha: bool = True
    use_paged_context_fmha: bool = True
    lora_plugin: str | None = None
    #: Of an engine of the backend tensorrt: the dtype of SawGemm, or None for TensorRT's own GEMMs.
    gemm_plugin: str | None = None


class BuildConfig(BaseModel):
    """An engine's limits, in ``trtllm-build``'s words and with its defaults where it has any."""

    model_config = ConfigDict(extra="allow")

    max_batch_size: int = Field(2048, gt=0)
    max_beam_width: Literal[1] = 1
    max_input_len: int = Field(gt=0)
    max_seq_len: int = Field(gt=1, le=MAX_POSITIONS)
    max_num_tokens: int = Field(8192, gt=0, le=MAX_POSITIONS)
    kv_cache_type: Literal["paged"] = "paged"
    gather_context_logits: bool = False
    gather_generation_logits: bool = False
    speculative_decoding_mode: int = 1  # none
    lora_config: dict[str, Any] = Field(default_factory=dict)
    plugin_config: PluginConfig = Field(default_factory=PluginConfig)

    @model_validator(mode="after")
    def _check(self) -> BuildConfig:
        if self.max_input_len >= self.max_seq_len:
            raise ValueError(
                f"max_input_len {self.max_input_len} leaves no token to generate within max_seq_len "
                f"{self.max_seq_len}: lower the one or raise the other"
            )
        if self.tokens_per_block not in TOKENS_PER_BLOCK:
            valid = ", ".join(map(str, TOKENS_PER_BLOCK))
            raise ValueError(f"tokens_per_block {self.tokens_per_block} is not supported: choose one of {valid}")
        if self.max_num_tokens < self.max_batch_size + self.tokens_per_block:
            raise ValueError(
                f"max_num_tokens {self.max_num_tokens} cannot hold a token of each of max_batch_size "
                f"{self.max_batch_size} sequences and a block of {self.tokens_per_block} tokens of a prompt: make it "
                f"at least {self.max_batch_size + self.tokens_per_block}, or lower max_batch_size"
            )
        return self

    @property
    def tokens_per_block(self) -> int:
        """Tokens of a KV block."""
        return self.plugin_config.tokens_per_block

    @property
    def most_prefill_chunk(self) -> int:
        """Tokens of the largest chunk that fits into a step beside any decodes."""
        most = self.max_num_tokens - self.max_batch_size
        return most - most % self.tokens_per_block

    @property
    def prefill_chunk(self) -> int:
        """Tokens of a prefill's chunk where no other number is asked for."""
        return min(PREFILL_CHUNK, self.most_prefill_chunk)


class StepLimits(NamedTuple):
    """What a step holds: the limits of :class:`BuildConfig` that bound one another."""

    max_batch_size: int
    max_num_tokens: int
    tokens_per_block: int

    @classmethod
    def of(cls, max_batch_size: int | None, max_num_tokens: int | None, tokens_per_block: int | None) -> StepLimits:
        """Fill in the defaults for None. Where they do not fit what is given, they give way to it."""
        defaults = BuildConfig.model_fields
        if tokens_per_block is None:
            most = PluginConfig.model_fields["tokens_per_block"].default
            room = most if max_num_tokens is None else max_num_tokens - (max_batch_size or 1)
            fitting = [size for size in TOKENS_PER_BLOCK if size <= min(most, room)]
            tokens_per_block = max(fitting, default=TOKENS_PER_BLOCK[0])
        if max_batch_size is None:
            most = defaults["max_batch_size"].default
            room = most if max_num_tokens is None else max_num_tokens - tokens_per_block
            max_batch_size = max(1, min(most, room))
        if max_num_tokens is None:
            max_num_tokens = max(defaults["max_num_tokens"].default, max_batch_size + tokens_per_block)
        return cls(max_batch_size, max_num_tokens, tokens_per_block)
