"""The model ``tensorrt_llm``: token ids to token ids. It holds the engine, for the model ``ensemble`` too."""

from __future__ import annotations

from typing import Any

import numpy as np

from saw_trtllm.errors import EngineError
from saw_trtllm.llm import LLM
from saw_trtllm.parallel.config import ParallelConfig
from saw_trtllm.runtime.kv_cache_config import KvCacheConfig
from saw_trtllm.runtime.parts import Part
from saw_trtllm.serve import names
from saw_trtllm.serve.engine_host import EngineHost, LocalEngine
from saw_trtllm.serve.engine_link import LinkServer, engine_address
from saw_trtllm.serve.generating import GeneratingModel, every
from saw_trtllm.serve.metrics import MetricsReporter
from saw_trtllm.serve.parameters import Parameters
from saw_trtllm.serve.request import Generation, parse
from saw_trtllm.serve.response import tokens_and_text
from saw_trtllm.serve.triton import read_tensors


class TensorrtLlmModel(GeneratingModel):
    """Runs an engine for any number of requests at once, its own and other models'.

    Parameters
    ----------
    pb_utils : module
        Triton's ``triton_python_backend_utils``.
    parameters : Parameters

    Raises
    ------
    EngineError
        If there is no engine, or it cannot run here.
    """

    def __init__(self, pb_utils: Any, parameters: Parameters) -> None:
        super().__init__(pb_utils, parameters)
        self._llm = _open(parameters)
        self._host = EngineHost(self._llm)
        self._engine = LocalEngine(self._host, self)
        # With one response to a request, Triton leads each through its models itself.
        decoupled = parameters.decoupled_mode
        self._link = LinkServer(self._host, engine_address(parameters.model_name)) if decoupled else None
        self._metrics = MetricsReporter(pb_utils, names.TENSORRT_LLM, names.VERSION)
        self._threads.append(
            every(
                parameters.stats_check_period_ms / 1000, self._closing, lambda: self._metrics.update(self._llm.stats())
            )
        )
        self._start()

    def finalize(self) -> None:
        """Cancel what is in flight, and release the engine."""
        if self._link is not None:
            self._link.close()
        super().finalize()

    def _generations(self, request: Any) -> list[Generation] | None:
        tensors = read_tensors(request, names.TENSORRT_LLM_MODEL)
        if "stop" in tensors and tensors["stop"].any():
            self._host.stop(request.request_id())
            return None
        return parse(tensors, self._parameters.exclude_input_in_output)

    def _tensors(self, generation: Generation, part: Part) -> dict[str, np.ndarray]:
        return tokens_and_text(generation, part, self._llm.tokenizer)


def _open(parameters: Parameters) -> LLM:
    if parameters.gpt_model_path is None:
        raise EngineError("config.pbtxt names no engine: set its parameter gpt_model_path, or let saw-triton write it")
    kv_cache = KvCacheConfig(
        max_tokens=parameters.max_tokens_in_paged_kv_cache,
        free_gpu_memory_fraction=parameters.kv_cache_free_gpu_mem_fraction,
        host_cache_size=parameters.kv_cache_host_memory_bytes,
        disk_cache_dir=parameters.disk_cache_dir,
        disk_cache_size=parameters.disk_cache_size,
        enable_block_reuse=parameters.enable_kv_cache_reuse,
        enable_partial_reuse=parameters.enable_partial_reuse,
        deterministic=parameters.deterministic,
    )
    return LLM(
        parameters.gpt_model_path,
        tokenizer=parameters.tokenizer_dir,
        kv_cache_config=kv_cache,
        max_queue_size=parameters.max_queue_size,
        verify=parameters.verify_engine,
        parallel_config=ParallelConfig(ranks=parameters.ranks, step_timeout=parameters.step_timeout),
        retry=parameters.retry,
    )
