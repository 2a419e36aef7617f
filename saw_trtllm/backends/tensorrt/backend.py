"""The backend ``tensorrt``: engines of the project's own definitions on the GPU."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path

from saw_trtllm.backends.tensorrt import device
from saw_trtllm.backends.tensorrt.versions import TensorRT
from saw_trtllm.engine.config import BackendName, EngineConfig
from saw_trtllm.errors import ConfigError
from saw_trtllm.format import default_hadamard_order
from saw_trtllm.model.config import ModelConfig
from saw_trtllm.model.quantization import WeightFormat
from saw_trtllm.plan.backend import asks_for_8bit_keys
from saw_trtllm.plan.gpus import check_capability, check_formats
from saw_trtllm.plan.options import BuildOptions
from saw_trtllm.plan.plan import BuildPlan
from saw_trtllm.plan.tensorrt_options import Phases
from saw_trtllm.plugins.library import plugin_library
from saw_trtllm.runtime.collectives import Collectives
from saw_trtllm.runtime.executor import Executor
from saw_trtllm.runtime.kv_cache_config import KvCacheConfig


class TensorRTBackend:
    """See :class:`saw_trtllm.plan.backend.Backend`."""

    name: BackendName = "tensorrt"
    has_float32 = False
    keeps_ranks = False

    def available(self) -> str:
        """TensorRT's version and the GPU, if the plugin library is there too."""
        tensorrt = TensorRT.load()
        plugin_library(tensorrt.trt)
        device.check_kernels()
        return f"TensorRT {tensorrt.version} on {device.gpu_name()}"

    def check(self, options: BuildOptions, model: ModelConfig, formats: Mapping[str, WeightFormat]) -> None:
        """Each version of TensorRT has dtypes of its own, and not each builds engines without weights."""
        if formats:
            major, minor = map(int, device.compute_capability().split("."))
            check_capability(formats, (major, minor), device.gpu_name())
            check_formats(model, formats)
        wide, order = asks_for_8bit_keys(options), default_hadamard_order(model.head_size)
        if wide is not None and options.hadamard_order not in (None, order):
            raise ConfigError(
                f"{wide} was given with --hadamard_order {options.hadamard_order}, and the write of keys of 8 bits has "
                f"kernels of order {order} alone for heads of {model.head_size}: leave --hadamard_order out"
            )
        tensorrt = TensorRT.load()
        tensorrt.check_activations(model.dtype)
        if options.strip_plan and not tensorrt.can_strip:
            raise ConfigError(
                f"--strip_plan was given, and TensorRT {tensorrt.version} builds no engine without its weights: leave "
                "it out, or install TensorRT 10.6 or newer"
            )

    def max_positions(self, model: ModelConfig) -> int:
        """All that the scaled RoPE reaches."""
        return model.max_positions

    def weight_dtype(self) -> None:
        """Each as the engine has it."""

    def free_memory(self, ranks: int = 1) -> int:
        """The GPU's, of which each rank has one."""
        return device.free_memory()

    def build(self, plan: BuildPlan, progress: Callable[[str], None] | None, phases: Phases | None) -> int:
        """Define the network and have TensorRT build it."""
        from saw_trtllm.backends.tensorrt.build import build_engine

        return build_engine(plan, progress, phases)

    def open_executor(
        self, folder: Path, config: EngineConfig, kv_cache: KvCacheConfig, collectives: Collectives
    ) -> Executor:
        """Deserialize the engine and plan its memory."""
        from saw_trtllm.backends.tensorrt.executor import TensorRTExecutor

        options = (kv_cache.max_tokens, kv_cache.free_gpu_memory_fraction, kv_cache.host_cache_size)
        return TensorRTExecutor(folder, config, *options, collectives=collectives)
