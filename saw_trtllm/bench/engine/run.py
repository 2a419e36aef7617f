"""``saw-bench engine``: engines that differ in nothing but their cache's format, on one GPU in one run."""

from __future__ import annotations

import dataclasses
import gc
import logging
import platform
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tqdm import tqdm

import saw_trtllm
from saw_trtllm.bench.engine import cases
from saw_trtllm.bench.engine.clock import StreamClock
from saw_trtllm.bench.engine.loop import time_loop, time_start
from saw_trtllm.bench.engine.random_engine import open_or_build
from saw_trtllm.bench.engine.record import Engine, EngineEnvironment, EngineResults, Loop, Profile, Step, TargetResult
from saw_trtllm.bench.engine.steps import StepBench
from saw_trtllm.bench.environment import driver_version, git_state, today
from saw_trtllm.config import ModelConfig
from saw_trtllm.engine import BuildConfig, EngineConfig, engine_file
from saw_trtllm.errors import SawError
from saw_trtllm.network import device
from saw_trtllm.network.options import NetworkOptions
from saw_trtllm.network.versions import TensorRT
from saw_trtllm.runtime.llm import LLM, KvCacheConfig, open_executor

logger = logging.getLogger(__name__)

TIMING_CACHE = "model.cache"


@dataclass(frozen=True)
class Plan:
    """What a run measures.

    Attributes
    ----------
    folder : Path
        An engine folder for each format lies in it, or is made, and the timing cache that they share.
    kvs : sequence of str
    num_layers : int
    batches, contexts : sequence of int
    optimization_level : int or None
    decode_profile : bool
    """

    folder: Path
    kvs: Sequence[str] = cases.KVS
    num_layers: int = cases.LLAMA_LAYERS
    batches: Sequence[int] = cases.BATCHES
    contexts: Sequence[int] = cases.CONTEXTS
    optimization_level: int | None = None
    decode_profile: bool = True

    @property
    def model(self) -> ModelConfig:
        """The engines' shape."""
        return cases.llama_config(self.num_layers)

    @property
    def limits(self) -> BuildConfig:
        """The engines' limits."""
        return cases.build_limits()

    def network_options(self) -> NetworkOptions:
        """How an engine is built, with the times of the one before."""
        cache = self.folder / TIMING_CACHE
        return NetworkOptions(
            decode_profile=self.decode_profile,
            input_timing_cache=cache if cache.is_file() else None,
            output_timing_cache=cache,
            optimization_level=self.optimization_level,
        )


def run_engines(plan: Plan, command: str, commit: str | None = None, output: Path | None = None) -> EngineResults:
    """Build what is missing, and measure.

    Parameters
    ----------
    plan : Plan
    command : str
        As it was typed, for the record.
    commit : str, optional
        For a tree without its git repository.
    output : Path, optional
        Where the record is written after each engine, so that an interrupted run is not lost.

    Raises
    ------
    SawError
        If there is no GPU or no TensorRT, or an engine cannot be built.
    """
    results = EngineResults(
        environment=describe(command, commit),
        num_layers=plan.num_layers,
        optimization_level=plan.optimization_level,
        decode_profile=plan.decode_profile,
        tokens_per_block=plan.limits.tokens_per_block,
        engines=[],
    )
    plan.folder.mkdir(parents=True, exist_ok=True)
    for kv in plan.kvs:
        engine, aborted = _run_engine(plan, kv)
        results = results.model_copy(update={"engines": [*results.engines, engine], "aborted": aborted})
        results = results.model_copy(update={"targets": judge(results)})
        if output is not None:
            results.save(output)
        if aborted:
            break
    return results


def judge(results: EngineResults) -> list[TargetResult]:
    """Hold the targets against a record."""
    found = []
    for target in cases.TARGETS:
        value = getattr(results, target.value)
        met = None if value is None else target.met(value)
        name = target.name.format(f"{target.limit:g}")
        found.append(TargetResult(name=name, value=None if value is None else round(value, 4), met=met))
    return found


def describe(command: str, commit: str | None) -> EngineEnvironment:
    """The current GPU and software."""
    from saw_trtllm.gpu import cuda

    head, dirty = (commit, None) if commit else git_state()
    number = cuda.call(cuda.runtime.cudaRuntimeGetVersion)
    return EngineEnvironment(
        gpu=device.gpu_name(),
        driver=driver_version(),
        cuda=f"{number // 1000}.{number % 1000 // 10}",
        tensorrt=TensorRT.load().version,
        python=platform.python_version(),
        saw_trtllm=saw_trtllm.__version__,
        commit=head,
        dirty=dirty,
        command=command,
        date=today(),
    )


def _run_engine(plan: Plan, kv: str) -> tuple[Engine, str | None]:
    """What was measured of a format, and what ended it early."""
    folder = plan.folder / kv
    build_s = open_or_build(folder, kv, plan.model, plan.limits, plan.network_options())
    config = EngineConfig.load(folder)
    found: dict[str, Any] = {"start_up": None, "loop": None, "tokens": 0, "memory": {}}
    found |= {"steps": [], "too_large": [], "profiles": []}
    aborted = None
    try:
        if kv == "saw_int4":
            found["start_up"] = time_start(folder)
        loop = _loop(folder)
        _measure(plan, folder, config, found, loop)
    except (SawError, RuntimeError) as e:
        logger.exception("%s", kv)
        aborted = f"{kv} ended the run: {e}"
    except KeyboardInterrupt:
        aborted = f"{kv} was interrupted"
    engine = Engine(
        kv=kv,
        bytes_per_token=config.bytes_per_token,
        build_s=None if build_s is None else round(build_s, 1),
        engine_bytes=(folder / engine_file()).stat().st_size,
        **found,
    )
    return engine, aborted


def _loop(folder: Path) -> tuple[float, int]:
    """µs of a step of the whole runtime, and the context that it is of."""
    batch, prompt, text = cases.LOOP_BATCH, cases.LOOP_PROMPT, cases.LOOP_TEXT
    with LLM(folder, kv_cache_config=KvCacheConfig(max_tokens=2 * batch * (prompt + text))) as llm:
        measured = time_loop(llm, batch, prompt, text)
    del llm
    gc.collect()  # the memory must be free for the next
    return measured


def _measure(plan: Plan, folder: Path, config: EngineConfig, found: dict[str, Any], loop: tuple[float, int]) -> None:
    """Fill in what an executor of its own measures, case by case."""
    executor = open_executor(folder, config, KvCacheConfig(enable_block_reuse=False))
    clock = StreamClock(executor.stream)
    try:
        bench = StepBench(executor, config, clock)
        found["tokens"] = executor.num_blocks * config.build_config.tokens_per_block
        found["memory"] = {name: int(value) for name, value in dataclasses.asdict(executor.memory).items()}
        step_us, context = loop
        gpu_us = bench.gpu_time_of(cases.LOOP_BATCH, context)
        found["loop"] = Loop(
            batch=cases.LOOP_BATCH, context=context, step_us=round(step_us, 2), gpu_us=round(gpu_us, 2)
        )
        steps: list[Step] = found["steps"]
        profiles: list[Profile] = found["profiles"]
        all_cases = [(batch, context) for batch in plan.batches for context in plan.contexts]
        for batch, context in tqdm(all_cases, desc=f"steps, {config.saw_int4.kv}", unit="case", disable=None):
            if bench.fits(batch, context):
                steps.append(bench.measure(batch, context))
            else:
                found["too_large"].append((batch, context))
        for batch, contexts in cases.PROFILED.items():
            profiles += [bench.profile(batch, n) for n in contexts if bench.fits(batch, n)]
    finally:
        clock.close()
        executor.shutdown()
