"""The ranks of an engine, each in a process of its own that puts its part through a case's steps.

Where there are fewer GPUs than ranks all take the first, and NCCL is told that each is a machine.
"""

from __future__ import annotations

import multiprocessing
import os
import time
from multiprocessing.queues import Queue
from pathlib import Path
from unittest import mock

import numpy as np

from saw_trtllm.checkpoint.layout import kv_heads_of_rank
from saw_trtllm.engine.config import EngineConfig
from saw_trtllm.runtime.collectives import Collectives, Rendezvous, join
from tests.engines.cases import STEPS, Case, num_tokens, pack

_SECONDS = 120
#: How a step is run: with sums by NCCL and without graphs, or by our kernel where it can and with them.
WAYS = {"nccl": {"graphs": False}, "one-shot": {"graphs": True}}


def run_ranks(work: Path, case: Case, size: int) -> list[dict[str, np.ndarray]]:
    """What each rank gives: ``{way}.{step}.logits`` and ``{way}.{step}.pool{i}``.

    Each step begins with the rows of ``work / case.name / reference.npz``.
    """
    context = multiprocessing.get_context("spawn")
    addresses = context.Queue()
    processes = [
        context.Process(target=_run, args=(work, case, rank, size, addresses), daemon=True) for rank in range(size)
    ]
    for process in processes:
        process.start()
    deadline = time.monotonic() + _SECONDS
    for process in processes:
        process.join(max(0.0, deadline - time.monotonic()))
    codes = [process.exitcode for process in processes]
    for process in processes:
        process.kill()
    assert codes == [0] * size
    found = []
    for rank in range(size):
        with np.load(work / case.name / f"rank{rank}.npz") as arrays:
            found.append(dict(arrays))
    return found


def _run(work: Path, case: Case, rank: int, size: int, addresses: Queue[bytes]) -> None:
    if rank == 0:
        with Rendezvous() as meeting:
            for _ in range(1, size):
                addresses.put(meeting.address)
            collectives = meeting.wait(size)
    else:
        collectives = join(addresses.get(timeout=60), rank, size)
    with np.load(work / case.name / "reference.npz") as arrays:
        expected = dict(arrays)
    found = {}
    for way in WAYS:
        found |= _steps(work, case, way, collectives, expected)
    np.savez(work / case.name / f"rank{rank}.npz", **found)


def _steps(
    work: Path, case: Case, way: str, collectives: Collectives, expected: dict[str, np.ndarray]
) -> dict[str, np.ndarray]:
    from saw_trtllm.backends.tensorrt import executor as module
    from saw_trtllm.backends.tensorrt import ranks
    from saw_trtllm.backends.tensorrt.cuda import call, runtime

    folder = case.engine(work)
    config = EngineConfig.load(folder)
    model = config.pretrained_config
    heads = kv_heads_of_rank(model.num_key_value_heads, config.tp_size, collectives.rank)
    patches = [mock.patch.object(ranks, "ONE_SHOT_BYTES", 0)] if way == "nccl" else []
    if call(runtime.cudaGetDeviceCount) < config.tp_size:
        os.environ |= {"NCCL_HOSTID": f"rank{collectives.rank}", "NCCL_SOCKET_IFNAME": "lo"}
        patches.append(mock.patch.object(module, "use_gpu_of_rank", return_value=None))
    for patch in patches:
        patch.start()
    executor = module.TensorRTExecutor(folder, config, num_tokens(config), 0.4, **WAYS[way], collectives=collectives)
    found, before = {}, None
    for name in STEPS:
        for i, pool in enumerate(executor.pools):
            rows = expected[f"{name if before is None else before}.pool{i}"][:, :, :, heads]
            pool.write(np.zeros_like(rows) if before is None else rows)
        count, before = len(STEPS[name]), name
        executor.launch(pack(name, config.pool_layout), [None] * count, [False] * count).result()
        shape = (len(expected[f"{name}.logits"]), model.vocab_size)
        found[f"{way}.{name}.logits"] = executor.logits.read(np.float32, shape)
        for i, pool in enumerate(executor.pools):
            shape = expected[f"{name}.pool{i}"][:, :, :, heads].shape
            found[f"{way}.{name}.pool{i}"] = pool.read(np.uint8, shape)
    executor.shutdown()
    for patch in patches:
        patch.stop()
    return found
