"""4-bit KV caches for TensorRT LLM engines.

``LLM`` runs an engine that ``saw-build`` made; see :mod:`saw_trtllm.format` for the cache's format. Importing this
package needs neither PyTorch nor TensorRT nor a GPU.
"""

from saw_trtllm.errors import SawError
from saw_trtllm.llm import LLM
from saw_trtllm.runtime.guided_decoding import GuidedDecodingParams
from saw_trtllm.runtime.kv_cache_config import KvCacheConfig
from saw_trtllm.runtime.outputs import CompletionOutput, RequestOutput
from saw_trtllm.runtime.sampling_params import SamplingParams
from saw_trtllm.version import __version__

__all__ = [
    "LLM",
    "CompletionOutput",
    "GuidedDecodingParams",
    "KvCacheConfig",
    "RequestOutput",
    "SamplingParams",
    "SawError",
    "__version__",
]
