"""What a backend is: the one interface between a plan or an engine and what builds and runs it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

from saw_trtllm.engine.config import BackendName, EngineConfig
from saw_trtllm.model.config import ModelConfig
from saw_trtllm.model.quantization import WeightFormat
from saw_trtllm.plan.options import BuildOptions
from saw_trtllm.plan.tensorrt_options import Phases
from saw_trtllm.runtime.collectives import Collectives
from saw_trtllm.runtime.executor import Executor
from saw_trtllm.runtime.kv_cache_config import KvCacheConfig

if TYPE_CHECKING:
    from saw_trtllm.plan.plan import BuildPlan


def asks_for_8bit_keys(options: BuildOptions) -> str | None:
    """The flag that gives some layers keys of 8 bits, or None."""
    if options.kv_bits is not None:
        return "--kv_bits"
    return "--kv saw_k8v4" if options.kv == "saw_k8v4" else None


class BackendLimits(Protocol):
    """What a plan asks of the backend that it is made for.

    Attributes
    ----------
    name : str
        As it stands in an engine's ``config.json``.
    has_float32 : bool
        Whether its engines compute in float32 too; a float32 model is built in float16 otherwise, where no dtype is
        asked for, as in TensorRT-LLM.
    keeps_ranks : bool
        Whether the engine is split over the checkpoint's ranks where no other number is asked for; otherwise it is
        whole then.
    """

    name: BackendName
    has_float32: bool
    keeps_ranks: bool

    def available(self) -> str:
        """What builds and runs engines here, in words; empty where there is nothing to tell.

        Raises
        ------
        BackendUnavailableError
            If something that it needs is missing, with what to do about it.
        """

    def check(self, options: BuildOptions, model: ModelConfig, formats: Mapping[str, WeightFormat]) -> None:
        """Reject what it cannot build.

        ``model`` is the whole, with the ranks that it is to be split over; ``formats`` are those of the engine's
        quantized weights.

        Raises
        ------
        ConfigError
        """

    def max_positions(self, model: ModelConfig) -> int:
        """Tokens of the longest sequence of a model that it can run."""

    def weight_dtype(self) -> str | None:
        """The dtype in which all weights lie in memory; None: each as the engine has it."""

    def free_memory(self, ranks: int = 1) -> int:
        """Bytes that are free, for each of so many ranks, where it keeps its weights and its cache."""


class Backend(BackendLimits, Protocol):
    """Builds engines and runs them.

    A backend is asked in this order: is it available, does it take these options, build. Its own modules import what
    they need, such as PyTorch or TensorRT; this object imports them when it builds or opens an engine, not before.
    """

    def build(self, plan: BuildPlan, progress: Callable[[str], None] | None, phases: Phases | None) -> int:
        """Write the engine folder of a plan, its config last, and return the bytes of its engine files.

        Raises
        ------
        CheckpointError
            If a weight cannot be read, is not finite, or is too large for the engine's dtype.
        EngineError
            If a compiler does not build the engine.
        """

    def open_executor(
        self, folder: Path, config: EngineConfig, kv_cache: KvCacheConfig, collectives: Collectives
    ) -> Executor:
        """What runs the steps of the engine in ``folder``, or a rank's part of them: all ranks open it together.

        Raises
        ------
        EngineError, BackendUnavailableError
            If this machine cannot run the engine.
        """
