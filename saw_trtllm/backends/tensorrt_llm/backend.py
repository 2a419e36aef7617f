"""The backend ``tensorrt_llm``: engines of TensorRT-LLM's own definitions, which its own executor runs."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import NoReturn

from saw_trtllm.backends.tensorrt_llm.limits import TensorRTLLMLimits
from saw_trtllm.engine.config import EngineConfig
from saw_trtllm.errors import EngineError
from saw_trtllm.plan.plan import BuildPlan
from saw_trtllm.plan.tensorrt_options import Phases
from saw_trtllm.runtime.collectives import Collectives
from saw_trtllm.runtime.kv_cache_config import KvCacheConfig


class TensorRTLLMBackend(TensorRTLLMLimits):
    """See :class:`saw_trtllm.plan.backend.Backend`."""

    def build(self, plan: BuildPlan, progress: Callable[[str], None] | None, phases: Phases | None) -> int:
        """Build the engines of all ranks by TensorRT-LLM's builder, which reports no phases."""
        from saw_trtllm.backends.tensorrt_llm.build import build_engines

        return build_engines(plan, progress)

    def open_executor(
        self, folder: Path, config: EngineConfig, kv_cache: KvCacheConfig, collectives: Collectives
    ) -> NoReturn:
        """Never: its engines run in TensorRT-LLM's own runtime."""
        raise EngineError(
            f"the engine in {folder} was built for the backend {self.name}, which TensorRT-LLM's own runtime runs: "
            "build it with --backend tensorrt or reference"
        )
