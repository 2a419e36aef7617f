"""Engines on the GPU: each alone, and then all together."""

from __future__ import annotations

import dataclasses
import gc
import logging
from collections.abc import Callable
from contextlib import ExitStack, closing
from pathlib import Path
from typing import TYPE_CHECKING

from tqdm import tqdm

from benchmarks.engine.clock import StreamClock
from benchmarks.engine.loop import time_loop, time_start
from benchmarks.engine.ranks import RankedExecutor
from benchmarks.engine.record import Engine, Loop
from benchmarks.engine.steps import StepBench, measure
from saw_trtllm.backends.tensorrt.cuda import DeviceBuffer, memory_info
from saw_trtllm.backends.tensorrt.engine_checks import gib
from saw_trtllm.backends.tensorrt.executor import TensorRTExecutor
from saw_trtllm.engine.config import EngineConfig, rank_files
from saw_trtllm.errors import EngineError
from saw_trtllm.llm import LLM
from saw_trtllm.runtime.kv_cache_config import KvCacheConfig

if TYPE_CHECKING:
    from benchmarks.engine.plan import Plan

logger = logging.getLogger(__name__)

_FRACTION = KvCacheConfig.free_gpu_memory_fraction


def measure_alone(plan: Plan, kv: str, build_s: float | None) -> Engine:
    """What is measured of an engine that has the GPU for itself: its start, and the whole runtime."""
    folder = plan.folder / kv
    config = EngineConfig.load(folder)
    start_up = time_start(folder) if kv == "saw_int4" else None
    batch, prompt, text = plan.loop()
    with LLM(folder, kv_cache_config=KvCacheConfig(max_tokens=2 * batch * (prompt + text))) as llm:
        step_us, context = time_loop(llm, batch, prompt, text)
        with closing(StreamClock(llm.executor.stream)) as clock:
            gpu_us = StepBench(llm.executor, config, clock).gpu_time_of(batch, context)
        memory = dataclasses.asdict(llm.executor.memory)
    del llm
    gc.collect()  # the memory must be free for the next
    loop = Loop(batch=batch, context=context, step_us=round(step_us, 2), gpu_us=round(gpu_us, 2))
    return _engine(kv, config, build_s, folder, memory).model_copy(update={"start_up": start_up, "loop": loop})


def _engine(kv: str, config: EngineConfig, build_s: float | None, folder: Path, memory: dict[str, int]) -> Engine:
    """What is known of an engine, or of one of its ranks, before it is timed."""
    return Engine(
        kv=kv,
        bytes_per_token=config.bytes_per_token,
        build_s=build_s,
        engine_bytes=sum(path.stat().st_size for path in rank_files(folder)),
        # What the pool could be: it may be no larger than the requests need.
        tokens=int(_FRACTION * (memory["pool"] + memory["free"])) // config.bytes_per_token,
        memory=memory,
        start_up=None,
        steps=[],
        too_large=[],
        profiles=[],
        loop=None,
    )


def measure_ranks(plan: Plan, kv: str, build_s: float | None) -> Engine:
    """The steps of an engine of several ranks. One is open at a time: a GPU's plugins know one group of ranks."""
    folder = plan.folder / kv
    config = EngineConfig.load(folder)
    with closing(RankedExecutor(folder, config)) as executor:
        memory = dataclasses.asdict(executor.memory)
        engine = _engine(kv, config.of_rank(), build_s, folder, memory)
        with closing(StreamClock(executor.stream)) as clock:
            bench = StepBench(executor, config, clock)
            for case in tqdm(plan.steps(), desc="steps", unit="case", disable=None):
                if not bench.fits(*case):
                    engine.too_large.append(case)
                    continue
                (step,) = measure([bench], *case)
                engine.steps.append(step)
                logger.info("%s, %dx%d: %.0f us, alone %.0f us", kv, *case, step.median_us, step.alone_us)
            engine.profiles.extend(bench.profile(*case) for case in plan.profiled() if bench.fits(*case))
    return engine


def measure_together(plan: Plan, engines: list[Engine], keep: Callable[[], None]) -> None:
    """Fill in the decode steps, case by case: all engines are open, and their caches lie in the same memory."""
    with ExitStack() as stack:
        pool = stack.enter_context(closing(DeviceBuffer(_pool_bytes(engines))))
        benches = {}
        for e in engines:
            folder = plan.folder / e.kv
            config = EngineConfig.load(folder)
            executor = TensorRTExecutor(folder, config, None, 1.0, pool_memory=pool)
            stack.callback(executor.shutdown)
            clock = stack.enter_context(closing(StreamClock(executor.stream)))
            benches[e.kv] = StepBench(executor, config, clock)
        for case in tqdm(plan.steps(), desc="steps", unit="case", disable=None):
            fitting = [e for e in engines if benches[e.kv].fits(*case)]
            for e, step in zip(fitting, measure([benches[e.kv] for e in fitting], *case), strict=True):
                e.steps.append(step)
                logger.info("%s, %dx%d: %.0f us, alone %.0f us", e.kv, *case, step.median_us, step.alone_us)
            for e in engines:
                if e not in fitting:
                    e.too_large.append(case)
            keep()
        for case in plan.profiled():
            for e in engines:
                if benches[e.kv].fits(*case):
                    e.profiles.append(benches[e.kv].profile(*case))
            keep()


def _pool_bytes(engines: list[Engine]) -> int:
    """Of the cache of several engines that are open at once."""
    free = memory_info()[0]
    needed = sum(e.memory[name] for e in engines for name in ("weights", "activations", "io"))
    if needed >= free:
        raise EngineError(
            f"{len(engines)} engines take {gib(needed)} and the GPU has {gib(free)} free: give fewer --kv, or fewer "
            "--num_layers"
        )
    return int(_FRACTION * (free - needed))
