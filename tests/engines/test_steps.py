"""Steps by hand on the GPU: the logits and the pool's bytes against the reference's.

Each step begins with the reference's rows, so that a code which another order of sums rounds the other way is seen in
the step that wrote it and in no other.
"""

from __future__ import annotations

import numpy as np
import pytest

from saw_trtllm.checkpoint import NUMPY_DTYPES
from saw_trtllm.engine.config import EngineConfig
from saw_trtllm.engine.step import DECODE
from saw_trtllm.format import ROW_TAIL_BYTES
from tests.engines.cases import STEP_CASES, STEPS, num_tokens, pack, tolerances

#: Of the largest logit, by dtype. Two layers of some ten roundings to 11 bits each, one upon the other, come to a third
#: of it; bfloat16 has 8 bits.
ROUNDING = {"float16": 0.005, "bfloat16": 0.04}
#: What is added where a query reads its own row in 4 bits: there a rounding may have moved a code by one.
MOVED_CODE = 0.02
#: Share of the codes that a rounding may move: a value lies within a rounding of the border between two codes.
MOVED = {"float16": 0.01, "bfloat16": 0.08}


@pytest.fixture(scope="module", params=STEP_CASES, ids=lambda case: case.name)
def run(request, work, reference, supported):
    """Runs a case's steps, each with and without a graph, and gives name, logits and pools: found and expected."""
    from saw_trtllm.backends.tensorrt.executor import TensorRTExecutor

    case = request.param
    supported(case)
    expected = reference(case)
    config = EngineConfig.load(case.engine(work))
    executors = [TensorRTExecutor(case.engine(work), config, num_tokens(config), 0.5, graphs=g) for g in (0, 1)]

    def step(name, executor):
        before = list(STEPS)[list(STEPS).index(name) - 1] if name != next(iter(STEPS)) else None
        for i, pool in enumerate(executor.pools):
            data = expected[f"{name}.pool{i}"]
            pool.write(np.zeros_like(data) if before is None else expected[f"{before}.pool{i}"])
        rows = len(expected[f"{name}.logits"])
        count = len(STEPS[name])
        executor.launch(pack(name, config.pool_layout), [None] * count, [False] * count).result()
        logits = executor.logits.read(np.float32, (rows, config.pretrained_config.vocab_size))
        pools = [pool.read(np.uint8, expected[f"{name}.pool{i}"].shape) for i, pool in enumerate(executor.pools)]
        return logits, pools

    yield config, expected, lambda name: [step(name, executor) for executor in executors]
    for executor in executors:
        executor.shutdown()


@pytest.mark.parametrize("name", STEPS)
def test_a_step_is_the_references(name, run):
    config, expected, execute = run
    dtype = config.pretrained_config.dtype
    decodes = sum(kind == DECODE for *_, kind in STEPS[name])
    want = expected[f"{name}.logits"]
    largest = np.abs(want).max()
    assert largest > 1
    for logits, pools in execute(name):
        assert np.isfinite(logits).all()
        error = np.abs(logits - want).max(axis=1) / largest
        rounding = ROUNDING[dtype]
        own_4bit = rounding + (MOVED_CODE if config.kv_format.quantized else 0)
        assert (error[: len(error) - decodes] <= rounding).all()
        assert (error[len(error) - decodes :] <= own_4bit).all()
        allowed = tolerances(name, config, pools, rounding, own_4bit)
        for i, (region, found) in enumerate(zip(config.regions, pools, strict=True)):
            both, tolerance = (found, expected[f"{name}.pool{i}"]), allowed[i][..., None]
            if not region.format.quantized:
                assert_rows(*both, tolerance, dtype)
            elif region.format.k_row_bytes == region.format.row_bytes:
                assert_codes(*both, 4, tolerance, dtype)
            else:
                for bits, *rows in zip((8, 4), *(key_and_value_rows(x, region.format) for x in both), strict=True):
                    assert_codes(*rows, bits, tolerance, dtype)


def key_and_value_rows(pool, kv_format):
    """The rows of K, and of V, of a pool where they are of two sizes."""
    heads, tokens = pool.shape[2:4]
    flat, keys = pool.reshape(*pool.shape[:2], -1), heads * tokens * kv_format.k_row_bytes
    return [x.reshape(*pool.shape[:4], -1) for x in (flat[..., :keys], flat[..., keys:])]


def assert_codes(found, want, bits, tolerance, dtype):
    """Codes of a row that a rounding of its values moved: by few, and few of them; scale and lo by their last bits."""
    codes = [x[..., :-ROW_TAIL_BYTES] for x in (found, want)]
    largest = 2**bits - 1
    for shift in range(0, 8, bits):
        parts = [((x >> shift) & largest).astype(np.int16) for x in codes]
        off = np.abs(parts[0] - parts[1])
        assert off.max() <= 1 + int(largest * ROUNDING[dtype])
        written = (want != 0).any(axis=-1)
        assert off[written].mean() < MOVED[dtype] * largest / 15
        assert not off[~written].any()
    tails = [np.ascontiguousarray(x[..., -ROW_TAIL_BYTES:]).view(np.float16).astype(np.float64) for x in (found, want)]
    assert (np.abs(tails[0] - tails[1]) <= tolerance * np.abs(tails[1]).max()).all()


def assert_rows(found, want, tolerance, dtype):
    """Rows of the engine's dtype."""
    rows = [x.view(NUMPY_DTYPES[dtype]).astype(np.float64) for x in (found, want)]
    assert (np.abs(rows[0] - rows[1]) <= tolerance * np.abs(rows[1]).max()).all()
    assert not found[(want == 0).all(axis=-1)].any()
