"""The backend ``reference``: PyTorch on any CPU, the oracle of the tests and the default where there is no GPU."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import psutil

from saw_trtllm.backends.reference.build import build_engine
from saw_trtllm.engine.config import BackendName, EngineConfig
from saw_trtllm.errors import BackendUnavailableError
from saw_trtllm.model.config import ModelConfig
from saw_trtllm.model.quantization import WeightFormat
from saw_trtllm.plan.options import BuildOptions
from saw_trtllm.plan.plan import BuildPlan
from saw_trtllm.plan.tensorrt_options import Phases
from saw_trtllm.runtime.collectives import Collectives
from saw_trtllm.runtime.executor import Executor
from saw_trtllm.runtime.kv_cache_config import KvCacheConfig


class ReferenceBackend:
    """See :class:`saw_trtllm.plan.backend.Backend`."""

    name: BackendName = "reference"
    has_float32 = True
    keeps_ranks = False

    def available(self) -> str:
        """Where PyTorch is installed there is nothing more to tell."""
        if importlib.util.find_spec("torch") is None:
            raise BackendUnavailableError(
                "the reference backend needs PyTorch, which is not installed: pip install 'saw-trtllm[reference]'"
            )
        return ""

    def check(self, options: BuildOptions, model: ModelConfig, formats: Mapping[str, WeightFormat]) -> None:
        """It takes all that a plan can hold."""

    def max_positions(self, model: ModelConfig) -> int:
        """All that the scaled RoPE reaches."""
        return model.max_positions

    def weight_dtype(self) -> str:
        """It computes in fp32, with weights dequantized."""
        return "float32"

    def free_memory(self, ranks: int = 1) -> int:
        """The host's, which its ranks share."""
        return psutil.virtual_memory().available // ranks

    def build(self, plan: BuildPlan, progress: Callable[[str], None] | None, phases: Phases | None) -> int:
        """Write the weights with all that is folded in; there are no phases."""
        return build_engine(plan, progress)

    def open_executor(
        self, folder: Path, config: EngineConfig, kv_cache: KvCacheConfig, collectives: Collectives
    ) -> Executor:
        """Load the weights."""
        from saw_trtllm.backends.reference.executor import ReferenceExecutor

        # In a thread that ends. OpenMP keeps workers for each living thread that has computed, and once they outnumber
        # the cores they sleep between products: the engine's thread, which runs the steps, would take twice as long.
        with ThreadPoolExecutor(1) as thread:
            options = (kv_cache.max_tokens, kv_cache.free_gpu_memory_fraction, kv_cache.host_cache_size, collectives)
            return thread.submit(ReferenceExecutor, folder, config, *options).result()
