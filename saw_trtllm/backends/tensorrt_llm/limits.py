"""What TensorRT-LLM's builder and executor take."""

from __future__ import annotations

from collections.abc import Mapping

import psutil

from saw_trtllm.backends.tensorrt_llm.release import require_engine_backend
from saw_trtllm.checkpoint.quantization.tensorrt_llm import written_section
from saw_trtllm.engine.config import BackendName
from saw_trtllm.errors import ConfigError
from saw_trtllm.model.config import ModelConfig
from saw_trtllm.model.quantization import WeightFormat
from saw_trtllm.plan.backend import asks_for_8bit_keys
from saw_trtllm.plan.options import BuildOptions


class TensorRTLLMLimits:
    """See :class:`saw_trtllm.plan.backend.BackendLimits`."""

    name: BackendName = "tensorrt_llm"
    has_float32 = False
    keeps_ranks = True

    def available(self) -> str:
        """TensorRT-LLM's version."""
        return f"TensorRT-LLM {require_engine_backend()}"

    def check(self, options: BuildOptions, model: ModelConfig, formats: Mapping[str, WeightFormat]) -> None:
        """Its executor has one size of rows in all layers, its layers have formats of weights, the plugins 16 bits."""
        tp_size = model.mapping.tp_size if options.tp_size is None else options.tp_size
        written_section(formats, model, tp_size)
        if model.dtype == "float32":
            raise ConfigError("the model is in float32, and the plugins compute in 16 bits: give --dtype float16")
        other_rows = "--kv_skip_layers" if options.kv_skip_layers is not None else asks_for_8bit_keys(options)
        if other_rows is not None:
            raise ConfigError(
                f"{other_rows} was given, and TensorRT-LLM's executor has rows of one size in all layers: leave it out"
            )

    def max_positions(self, model: ModelConfig) -> int:
        """TensorRT-LLM's own table of positions ends there."""
        return model.max_position_embeddings

    def weight_dtype(self) -> None:
        """Each as the engine has it."""

    def free_memory(self, ranks: int = 1) -> int:
        """The host's: each rank's GPU is the executor's to ask."""
        return psutil.virtual_memory().available
