"""Which engines are measured, and how they come to be."""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from itertools import product
from pathlib import Path
from typing import Any

from benchmarks.engine import cases
from benchmarks.engine.random_engine import build_in_child, engine_config
from saw_trtllm.engine.config import CONFIG_FILE, EngineConfig
from saw_trtllm.engine.limits import BuildConfig
from saw_trtllm.errors import ConfigError
from saw_trtllm.model.config import ModelConfig
from saw_trtllm.plan.tensorrt_options import NetworkOptions

TIMING_CACHE = "model.cache"


@dataclass(frozen=True)
class Plan:
    """What a run measures.

    Attributes
    ----------
    folder : Path
        An engine folder for each format lies in it, or is made, and the timing cache that they share.
    model : ModelConfig
        Of all engines.
    limits : BuildConfig
        Of all engines: cases beyond them are left out.
    kvs : sequence of str
    batches, contexts : sequence of int
    optimization_level : int or None
    decode_profile : bool or None
    gemm_plugin : str
        As of :class:`~saw_trtllm.plan.tensorrt_options.NetworkOptions`, for engines that are built.
    qformat : str
        How the linear layers' weights are quantized, as saw-build's.
    build_timeout_s : float or None
        Seconds that each build may take.
    build_workers : int
        Engines that are built at once.
    vllm : sequence of str
        Caches of vLLM's, whose steps are measured beside them.
    """

    folder: Path
    model: ModelConfig
    limits: BuildConfig
    kvs: Sequence[str] = cases.KVS
    batches: Sequence[int] = cases.BATCHES
    contexts: Sequence[int] = cases.CONTEXTS
    optimization_level: int | None = None
    decode_profile: bool | None = None
    gemm_plugin: str = "auto"
    qformat: str = "full_prec"
    build_timeout_s: float | None = None
    build_workers: int = 1
    vllm: Sequence[str] = ()

    def __post_init__(self) -> None:
        for kv in self.kvs:
            if (found := self.existing(kv)) is None:
                continue
            wanted = engine_config(kv, self.model, self.limits, self.qformat)
            if (found.saw_int4.kv, found.pretrained_config, found.build_config, found.saw_int4.quantized) != (
                *(kv, self.model, self.limits),
                wanted.saw_int4.quantized,
            ):
                raise ConfigError(
                    f"{self.folder / kv} holds another engine than this run measures: give another --engine_dir"
                )

    @classmethod
    def of(cls, folder: Path, kvs: Sequence[str], model: ModelConfig, **fields: Any) -> Plan:
        """A plan of the engines that a folder holds, or else of ``model`` with limits that hold all cases.

        Raises
        ------
        ConfigError
            If the folder holds engines that differ in more than their formats.
        """
        plans = cls(folder, model, cases.build_limits(), (), **fields)
        found = next((config for kv in kvs if (config := plans.existing(kv)) is not None), None)
        if found is not None:
            plans = replace(plans, model=found.pretrained_config, limits=found.build_config)
        return replace(plans, kvs=kvs)

    def existing(self, kv: str) -> EngineConfig | None:
        """The config of a format's engine that is there already."""
        return EngineConfig.load(self.folder / kv) if (self.folder / kv / CONFIG_FILE).exists() else None

    def network_options(self) -> NetworkOptions:
        """How an engine is built, with the times of the one before."""
        cache = self.folder / TIMING_CACHE
        return NetworkOptions(
            decode_profile=self.decode_profile,
            input_timing_cache=cache if cache.is_file() else None,
            output_timing_cache=cache,
            optimization_level=self.optimization_level,
            gemm_plugin=self.gemm_plugin,
        )

    def steps(self) -> list[tuple[int, int]]:
        """Batches and contexts of the decode steps."""
        return [case for case in product(self.batches, self.contexts) if self._within(*case)]

    def profiled(self) -> list[tuple[int, int]]:
        """Those whose layers are timed."""
        every = [(batch, context) for batch, contexts in cases.PROFILED.items() for context in contexts]
        return [case for case in every if self._within(*case)]

    def loop(self) -> tuple[int, int, int]:
        """Requests of the run through the whole runtime, tokens of their prompts and texts."""
        text = min(cases.LOOP_TEXT, self.limits.max_seq_len // 4)
        prompt = min(cases.LOOP_PROMPT, self.limits.max_seq_len - text, self.limits.max_input_len)
        return min(cases.LOOP_BATCH, self.limits.max_batch_size), prompt, text

    def _within(self, batch: int, context: int) -> bool:
        return batch <= self.limits.max_batch_size and context <= self.limits.max_seq_len


def build_missing(plan: Plan) -> dict[str, float]:
    """Build the engines that are not there; seconds that each took."""
    missing = [kv for kv in plan.kvs if plan.existing(kv) is None]

    def build(kv: str) -> float:
        config = engine_config(kv, plan.model, plan.limits, plan.qformat)
        return round(build_in_child(plan.folder / kv, config, plan.network_options(), plan.build_timeout_s), 1)

    with ThreadPoolExecutor(plan.build_workers) as pool:
        return dict(zip(missing, pool.map(build, missing), strict=True))
