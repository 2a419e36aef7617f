"""The backends, and which of them an engine is built for: the one file that knows all three."""

from __future__ import annotations

from pathlib import Path

from saw_trtllm.backends.reference.backend import ReferenceBackend
from saw_trtllm.backends.tensorrt.backend import TensorRTBackend
from saw_trtllm.backends.tensorrt_llm.backend import TensorRTLLMBackend
from saw_trtllm.engine.config import EngineConfig
from saw_trtllm.errors import BackendUnavailableError
from saw_trtllm.plan.backend import Backend
from saw_trtllm.plan.ranks import check_ranks
from saw_trtllm.runtime.collectives import ALONE, Collectives
from saw_trtllm.runtime.executor import Executor
from saw_trtllm.runtime.kv_cache_config import KvCacheConfig

_REFERENCE, _TENSORRT, _TENSORRT_LLM = ReferenceBackend(), TensorRTBackend(), TensorRTLLMBackend()
BACKENDS: dict[str, Backend] = {backend.name: backend for backend in (_TENSORRT_LLM, _TENSORRT, _REFERENCE)}


def choose_backend(asked: str) -> tuple[Backend, str]:
    """Settle on a backend.

    Parameters
    ----------
    asked : str
        A backend's name, or ``auto``: TensorRT where it, a GPU and the plugins are, for TensorRT-LLM if that is
        installed beside it; else the reference.

    Returns
    -------
    tuple of (Backend, str)
        The backend, and why.

    Raises
    ------
    BackendUnavailableError
        If the one asked for is not available.
    """
    if asked != "auto":
        backend = BACKENDS[asked]
        return backend, "; ".join(filter(None, ("asked for", backend.available())))
    try:
        found = _TENSORRT.available()
    except BackendUnavailableError as e:
        _REFERENCE.available()
        # What is the matter, without what to do about it.
        return _REFERENCE, f"the default; {str(e).rpartition(': ')[0]}"
    try:
        return _TENSORRT_LLM, f"the best here; {found}, for {_TENSORRT_LLM.available()}"
    except (BackendUnavailableError, ImportError):  # or what it needs is missing
        return _TENSORRT, f"the best here; {found}"


def open_executor(
    folder: Path, config: EngineConfig, kv_cache: KvCacheConfig, collectives: Collectives = ALONE
) -> Executor:
    """The executor of an engine's backend.

    Parameters
    ----------
    folder : Path
    config : EngineConfig
        Of the engine in ``folder``.
    kv_cache : KvCacheConfig
    collectives : Collectives
        The ranks of an engine that is split over several, all of which open it at once.

    Raises
    ------
    EngineError, BackendUnavailableError
        If this machine cannot run the engine, or the ranks have not one engine.
    RankError
        If a rank is gone.
    """
    check_ranks(folder, config, collectives)
    return BACKENDS[config.saw_int4.backend].open_executor(folder, config, kv_cache, collectives)
