"""TensorRT-LLM engines with a 4-bit KV cache: its own model definitions, with the attention swapped.

Three ways in, all of them in the engine backend of TensorRT-LLM, whose last release is 1.2.1:

- ``saw-build --backend tensorrt_llm`` (:mod:`saw_trtllm.trtllm.build`);
- ``trtllm-build --model_cls_file model_cls.py --model_cls_name SawLLaMAForCausalLM``, TensorRT-LLM's own command;
- :func:`saw_trtllm.trtllm.model.swap` for a model of ``tensorrt_llm.models`` that is there already.

What is imported here needs no TensorRT-LLM; ``attention``, ``model``, ``models``, ``rewrite`` and ``build`` do.
"""

from saw_trtllm.trtllm.engine_config import as_built, for_executor
from saw_trtllm.trtllm.options import SwapOptions
from saw_trtllm.trtllm.release import LAST_RELEASE, require_engine_backend

__all__ = ["LAST_RELEASE", "SwapOptions", "as_built", "for_executor", "require_engine_backend"]
