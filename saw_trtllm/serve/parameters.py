"""The settings that a model finds in its ``config.pbtxt``."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from saw_trtllm.errors import ConfigError, first_error
from saw_trtllm.llm import MAX_QUEUE_SIZE
from saw_trtllm.serve.names import TENSORRT_LLM


class Parameters(BaseModel):
    """Values of ``parameters`` in ``config.pbtxt``, in the words of TensorRT-LLM's repository."""

    # Triton has parameters of its own, EXECUTION_ENV_PATH for one.
    model_config = ConfigDict(extra="ignore", protected_namespaces=())

    model_name: str = Field(TENSORRT_LLM, description="the model's folder")
    gpt_model_path: Path | None = Field(None, description="the engine folder")
    tokenizer_dir: Path | None = Field(None, description="folder of tokenizer.json; by default the engine folder")
    add_special_tokens: bool = Field(True, description="whether the tokenizer adds its special tokens to a prompt")
    max_tokens_in_paged_kv_cache: int | None = Field(None, gt=0, description="tokens that the KV cache holds")
    kv_cache_free_gpu_mem_fraction: float = Field(0.9, gt=0, le=1, description="share of the free memory for the cache")
    kv_cache_host_memory_bytes: int = Field(0, ge=0, description="bytes of host memory for blocks that leave the pool")
    disk_cache_dir: Path | None = Field(None, description="folder for blocks that outlive the process")
    disk_cache_size: int = Field(0, ge=0, description="bytes that its files may have")
    enable_kv_cache_reuse: bool = Field(True, description="whether prompts with the same beginning share blocks")
    enable_partial_reuse: bool = Field(True, description="whether a match may end within a block")
    deterministic: bool = Field(False, description="whether a text must not depend on what is in the cache")
    exclude_input_in_output: bool = Field(False, description="for requests that do not say")
    decoupled_mode: bool = Field(True, description="whether a request may have several responses, and stream")
    max_queue_size: int = Field(
        MAX_QUEUE_SIZE, ge=0, description="requests that may wait for their first step; 0 is any number"
    )
    verify_engine: bool = Field(True, description="whether the engine's checksums are checked when it is opened")
    ranks: Literal["ray", "processes"] = Field("ray", description="who starts the ranks of a tensor parallel engine")
    step_timeout: float = Field(60.0, gt=0, description="seconds after which a rank that does not answer is lost")
    retry: int = Field(0, ge=0, description="how often a request is computed once more when a rank is lost")
    cancellation_check_period_ms: int = Field(100, gt=0, description="how often to ask whether a client has gone")
    stats_check_period_ms: int = Field(100, gt=0, description="how often to update the metrics")

    @classmethod
    def read(cls, model_config: str) -> Parameters:
        """Read what Triton passes to ``initialize`` as ``args["model_config"]``.

        Raises
        ------
        ConfigError
            If a value is not of its type.
        """
        config = json.loads(model_config)
        # An empty string is TensorRT-LLM's way to leave a parameter unset.
        strings = {k: v["string_value"] for k, v in config.get("parameters", {}).items() if v["string_value"]}
        named = {"model_name": config["name"]} if "name" in config else {}
        decoupled = config.get("model_transaction_policy", {}).get("decoupled", False)
        return cls.of(**{"decoupled_mode": decoupled, **strings, **named})

    @classmethod
    def of(cls, **values: object) -> Parameters:
        """Make parameters out of values or their strings.

        Raises
        ------
        ConfigError
            If a value is not of its type or out of range.
        """
        try:
            return cls(**values)
        except ValidationError as e:
            raise ConfigError(f"a parameter of the Triton models is wrong: {first_error(e)}") from e

    @property
    def tokenizer_folder(self) -> Path:
        """Where the tokenizer is."""
        folder = self.tokenizer_dir or self.gpt_model_path
        if folder is None:
            raise ConfigError(
                "config.pbtxt names no tokenizer: set its parameter tokenizer_dir, or let saw-triton write it"
            )
        return folder

    def strings(self, names: tuple[str, ...]) -> Mapping[str, str]:
        """The named parameters as ``config.pbtxt`` holds them."""
        return {name: _string(getattr(self, name)) for name in names}


def _string(value: object) -> str:
    if value is None:
        return ""
    return str(value).lower() if isinstance(value, bool) else str(value)
