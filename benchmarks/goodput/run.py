"""A load of conversations on servers with pools of several sizes."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

from benchmarks.common.record import Environment
from benchmarks.goodput.measure import conversations, measure, point
from benchmarks.goodput.record import GoodputResults, Load, Point
from benchmarks.goodput.report import OURS
from benchmarks.goodput.vllm import run_vllm
from saw_trtllm import LLM, KvCacheConfig
from saw_trtllm.bench.load import check_load
from saw_trtllm.engine.config import EngineConfig
from saw_trtllm.errors import ConfigError
from saw_trtllm.runtime.executor import Executor

#: In which some of the host's memory is pinned, while it goes on.
_PINNING_S = 0.3


def run_ours(engine: Path, pools: Sequence[int], host_bytes: int, load: Load) -> Iterator[Point]:
    """An engine of ours with each pool in turn."""
    config = EngineConfig.load(engine)
    for pool_bytes in pools:
        cache = KvCacheConfig(max(1, pool_bytes // config.bytes_per_token), host_cache_size=host_bytes)
        with LLM(engine, kv_cache_config=cache) as llm:
            _wait_for_host(llm.executor)
            vocab_size = config.pretrained_config.vocab_size
            check_load(llm, conversations(load, vocab_size))
            report = asyncio.run(measure(llm, load, vocab_size))
        yield point(OURS, config.saw_int4.kv, pool_bytes, host_bytes, report)


def _wait_for_host(executor: Executor) -> None:
    """Wait until the host's memory is pinned, which slows first steps down, or no more of it can be."""
    ready = -1
    while executor.num_host_blocks and ready < executor.num_ready_host_blocks:
        ready = executor.num_ready_host_blocks
        time.sleep(_PINNING_S)


def run_goodput(
    engines: Sequence[Path],
    vllm: Sequence[str],
    pools: Sequence[int],
    host_bytes: int,
    load: Load,
    environment: Environment,
    previous: GoodputResults | None,
) -> Iterator[GoodputResults]:
    """Measure servers one after the other.

    Parameters
    ----------
    engines : sequence of Path
        Of one shape.
    vllm : sequence of str
        Caches of vLLM's that are measured in place of the engines, of the first one's shape: "fp16", "fp8".
    pools : sequence of int
        Bytes.
    host_bytes : int
        Of the host's tier; vLLM has none here.
    load : Load
    environment : Environment
    previous : GoodputResults, optional
        Whose points stay.

    Yields
    ------
    GoodputResults
        What is known after each point.

    Raises
    ------
    ConfigError
        If ``previous`` is of another load or shape, or a conversation does not fit.
    """
    shape = EngineConfig.load(engines[0]).pretrained_config
    model = f"{shape.architecture}, {shape.num_hidden_layers} layers of {shape.hidden_size}"
    if previous is not None and (previous.model, previous.workload) != (model, load):
        raise ConfigError("--output holds another load, or another model: give another file")
    points: list[Point] = []
    if previous is not None:
        points, environment = list(previous.points), previous.environment
    if vllm:
        runs: list[Iterator[Point]] = [run_vllm(shape, kv, pools, load) for kv in vllm]
    else:
        runs = [run_ours(engine, pools, host_bytes, load) for engine in engines]
    for run in runs:
        for new in run:
            points = [p for p in points if _place(p) != _place(new)] + [new]
            yield GoodputResults(environment=environment, model=model, workload=load, points=points)


def _place(p: Point) -> tuple[str, str, int, int]:
    return p.server, p.kv, p.pool_bytes, p.host_bytes
