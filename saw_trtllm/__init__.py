"""4-bit KV caches for TensorRT LLM engines.

``LLM`` runs an engine that ``saw-build`` made; see :mod:`saw_trtllm.format` for the cache's format. Importing this
package needs neither PyTorch nor TensorRT nor a GPU.
"""

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from saw_trtllm.errors import SawError
    from saw_trtllm.llm import LLM
    from saw_trtllm.runtime.guided_decoding import GuidedDecodingParams
    from saw_trtllm.runtime.kv_cache_config import KvCacheConfig
    from saw_trtllm.runtime.outputs import CompletionOutput, RequestOutput
    from saw_trtllm.runtime.sampling_params import SamplingParams
    from saw_trtllm.version import __version__
else:
    _MODULES = {
        "LLM": "llm",
        "CompletionOutput": "runtime.outputs",
        "GuidedDecodingParams": "runtime.guided_decoding",
        "KvCacheConfig": "runtime.kv_cache_config",
        "RequestOutput": "runtime.outputs",
        "SamplingParams": "runtime.sampling_params",
        "SawError": "errors",
        "__version__": "version",
    }

    def __getattr__(name: str) -> object:
        # Most of a second: a command must not be in the middle of it before it can say how Ctrl-C ends it.
        if name not in _MODULES:
            raise AttributeError(f"module 'saw_trtllm' has no attribute {name!r}")
        globals()[name] = value = getattr(import_module(f"saw_trtllm.{_MODULES[name]}"), name)
        return value

    def __dir__() -> list[str]:
        return sorted({*globals(), *_MODULES})


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
