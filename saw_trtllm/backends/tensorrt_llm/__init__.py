"""TensorRT-LLM engines with a 4-bit KV cache: its own model definitions, with the attention swapped.

Three ways in, all of them in the engine backend of TensorRT-LLM, whose last release is 1.2.1:

- ``saw-build --backend tensorrt_llm`` (:mod:`saw_trtllm.backends.tensorrt_llm.build`);
- ``trtllm-build --model_cls_file model_cls.py --model_cls_name SawLLaMAForCausalLM``, TensorRT-LLM's own command;
- :func:`saw_trtllm.backends.tensorrt_llm.model.swap` for a model of ``tensorrt_llm.models`` that is there already.

What is imported here needs no TensorRT-LLM; ``attention``, ``model``, ``models``, ``rewrite`` and ``build`` do.
"""

from saw_trtllm.backends.tensorrt_llm.options import SwapOptions
from saw_trtllm.backends.tensorrt_llm.release import LAST_RELEASE, require_engine_backend
from saw_trtllm.engine.executor_view import as_built, for_executor

__all__ = ["LAST_RELEASE", "SwapOptions", "as_built", "for_executor", "require_engine_backend"]
