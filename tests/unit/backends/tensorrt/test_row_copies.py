"""Rows that are copied from block to block within the GPU's pools: the same bytes as in the reference's."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch

from saw_trtllm.backends.reference.cache import PagedCache
from saw_trtllm.backends.tensorrt.executor import TensorRTExecutor
from saw_trtllm.engine.config import Pool
from saw_trtllm.engine.step import RowCopy
from saw_trtllm.format import KVFormat

BLOCKS, HEADS, TOKENS = 4, 3, 16


@pytest.mark.parametrize("kv", ["fp16", "saw_int4", "saw_k8v4"])
def test_rows_are_copied_as_the_reference_does(kv, rng):
    narrow, other = KVFormat("saw_int4", 64), KVFormat(kv, 64)
    pools = [Pool(narrow, [0, 2]), Pool(other, [1], region=1)]
    cache = PagedCache(pools, BLOCKS, HEADS, TOKENS)
    for pool in cache.pools:
        pool.data.copy_(torch.randint(256, pool.data.shape, generator=rng, dtype=torch.uint8))
    memory = [pool.data.numpy().copy().reshape(-1) for pool in cache.pools]

    def copy_rows(target: int, source: int, pitch: int, width: int, rows: int) -> None:
        which = source >> 32
        assert which == target >> 32
        start, end = source & 0xFFFFFFFF, target & 0xFFFFFFFF
        for i in range(rows):
            part = memory[which][start + i * pitch : start + i * pitch + width]
            memory[which][end + i * pitch : end + i * pitch + width] = part

    executor = SimpleNamespace(
        _config=SimpleNamespace(
            build_config=SimpleNamespace(tokens_per_block=TOKENS),
            pretrained_config=SimpleNamespace(num_key_value_heads=HEADS),
            regions=[(pool.format, pool.num_layers) for pool in cache.pools],
        ),
        pools=[SimpleNamespace(address=i << 32) for i in range(2)],
        _stream=SimpleNamespace(copy_rows=copy_rows),
    )
    copies = [RowCopy(1, 2, 5), RowCopy(0, 3, 16), RowCopy(2, 0, 1)]
    TensorRTExecutor._copy_rows(executor, copies)
    cache.copy(copies)
    for found, pool in zip(memory, cache.pools, strict=True):
        assert np.array_equal(found, pool.data.numpy().reshape(-1))
