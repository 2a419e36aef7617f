"""``python -m benchmarks engine``: engines that differ in nothing but their cache's format, on one GPU in one run."""

from __future__ import annotations

import logging
from pathlib import Path

from benchmarks.common.environment import describe
from benchmarks.common.record import Environment
from benchmarks.common.target import TargetResult
from benchmarks.engine import cases
from benchmarks.engine.plan import Plan, build_missing
from benchmarks.engine.record import EngineResults, Shape
from benchmarks.engine.vllm import measure_vllm
from saw_trtllm.backends.tensorrt import device
from saw_trtllm.backends.tensorrt.versions import TensorRT
from saw_trtllm.engine.config import EngineConfig
from saw_trtllm.errors import SawError

logger = logging.getLogger(__name__)


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
        Where the record is written after each engine and each case, so that an interrupted run is not lost.

    Raises
    ------
    SawError
        If there is no GPU or no TensorRT, or an engine cannot be built.
    """
    # After the first look for TensorRT and a GPU, whose sentence is better than an import's.
    where = environment(command, commit)
    from benchmarks.engine.on_gpu import measure_alone, measure_ranks, measure_together

    results = EngineResults(
        environment=where,
        shape=Shape.of(plan.model, plan.qformat),
        optimization_level=plan.optimization_level,
        decode_profile=bool(plan.decode_profile),
        tokens_per_block=plan.limits.tokens_per_block,
        tp_size=plan.model.mapping.tp_size,
        engines=[],
    )

    def keep() -> None:
        nonlocal results
        results = results.model_copy(update={"targets": judge(results)})
        if output is not None:
            results.save(output)

    plan.folder.mkdir(parents=True, exist_ok=True)
    build_s = build_missing(plan)
    aborted = None
    try:
        ranks = results.tp_size > 1
        for kv in plan.kvs:
            engine = (measure_ranks if ranks else measure_alone)(plan, kv, build_s.get(kv))
            gemm_plugin = EngineConfig.load(plan.folder / kv).build_config.plugin_config.gemm_plugin
            update = {"engines": [*results.engines, engine], "gemm_plugin": gemm_plugin}
            update["decode_profile"] = plan.network_options().has_decode_profile(gemm_plugin)
            results = results.model_copy(update=update)
            keep()
        if not ranks:
            measure_together(plan, results.engines, keep)
        for kv in plan.vllm:
            steps = [step for step in plan.steps() if step in cases.PEER_STEPS]
            peer = measure_vllm(plan.model, kv, plan.qformat, steps)
            results = results.model_copy(update={"peers": [*results.peers, peer]})
            keep()
    except (SawError, RuntimeError) as e:
        if not results.engines:
            raise
        logger.exception("the run ends early")
        aborted = f"the run ended early: {e}"
    except KeyboardInterrupt:
        aborted = "the run was interrupted"
    results = results.model_copy(update={"aborted": aborted})
    keep()
    return results


def environment(command: str, commit: str | None) -> Environment:
    """Where engines are measured.

    Raises
    ------
    BackendUnavailableError
        If there is no TensorRT or no GPU.
    """
    return describe(command, commit, gpu=device.gpu_name(), cuda=_cuda_version(), tensorrt=TensorRT.load().version)


def judge(results: EngineResults) -> list[TargetResult]:
    """Hold the targets against a record."""
    found = []
    for words, name, limit in cases.TARGETS:
        value = getattr(results, name)
        found.append(limit.judge(words.format(f"{limit.limit:g}"), None if value is None else round(value, 4)))
    return found


def _cuda_version() -> str:
    from saw_trtllm.backends.tensorrt import cuda

    number = cuda.call(cuda.runtime.cudaRuntimeGetVersion)
    return f"{number // 1000}.{number % 1000 // 10}"
