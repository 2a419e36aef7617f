"""What plays TensorRT-LLM's executor for the GPU tests: it loses no row, and does all that it is there for."""

from collections import Counter

import numpy as np
import pytest

from saw_trtllm.engine.step import PREFILL, SECONDARY_POOL_BIT
from tests.support.executor.blocks import PRIMARY, SECONDARY
from tests.support.executor.contract import GRAPH_ROUNDING, NUM_STEPS, RUNS, make_executor
from tests.support.fakes import tensorrt_frontend as fake_tensorrt_frontend

SEEDS = (0, 1)


def row_of(tokens):
    """Eight bytes that tell a token's row: that of the prefix that it ends."""
    return np.frombuffer(np.int64(hash(tuple(tokens))).tobytes(), np.uint8)


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("name", RUNS)
def test_each_sequence_finds_its_rows(name, seed):
    executor = make_executor(name, seed)
    size = executor.tokens_per_block
    memory = [
        {where: np.zeros((n, len(layers), 2, 1, size, 8), np.uint8) for where, n in executor.num_blocks.items()}
        for layers in executor.layers
    ]
    for _ in range(NUM_STEPS):
        step = executor.step()
        for copy in step.copies:
            copy.apply(memory[copy.pool])
        requests = executor.batch
        for pool, sequences in enumerate(step.sequences):
            for request, sequence in zip(requests, sequences, strict=True):
                length = sequence.start + len(sequence.token_ids)
                rows = memory[pool][PRIMARY]
                first = max(0, sequence.start + 1 - executor.managers[pool].window)
                for position in range(length):
                    block, row = sequence.block_table[position // size], position % size
                    due = row_of(request.tokens[: position + 1])
                    if position >= sequence.start:
                        rows[block, :, :, 0, row] = due
                    elif position >= first:
                        assert (rows[block, :, :, 0, row] == due).all()


def test_the_tensors_are_those_of_the_executor():
    executor = make_executor("two windows", 0)
    for _ in range(NUM_STEPS):
        step = executor.step()
        x = step.inputs
        first = step.sequences[0]
        types = x["host_request_types"]
        assert (np.diff(types) >= 0).all()
        assert x["kv_cache_block_offsets"].shape == (2, len(types), 2, executor.max_blocks)
        for pool, sequences in enumerate(step.sequences):
            layers = len(executor.layers[pool])
            for i, sequence in enumerate(sequences):
                used = -(-int(x["sequence_length"][i]) // executor.tokens_per_block)
                entries = x["kv_cache_block_offsets"][pool, i, :, :used] & (SECONDARY_POOL_BIT - 1)
                assert (entries[0] // (2 * layers)).tolist() == sequence.block_table[:used]
                assert (entries[1] == entries[0] + 1).all()
        for i, sequence in enumerate(first):
            prefill = sequence.kind == PREFILL
            assert x["sequence_length"][i] == sequence.start + len(sequence.token_ids)
            assert x["host_past_key_value_lengths"][i] == x["sequence_length"][i] - (not prefill)
            assert x["context_lengths"][i] == (len(sequence.token_ids) if prefill else sequence.prompt_len)
            assert prefill or sequence.start >= sequence.prompt_len
        if step.graph_key is not None:
            rounded = step.for_capture(executor.max_seq_len)["host_past_key_value_lengths"]
            assert (rounded >= x["host_past_key_value_lengths"]).all()
            assert set(rounded.tolist()) <= {256, 511}


def test_the_runs_have_all_that_an_executor_does():
    """So that no test on the GPU passes for want of what it is to show."""
    seen = Counter()
    for name in RUNS:
        for seed in SEEDS:
            executor, keys = make_executor(name, seed), set()
            for _ in range(NUM_STEPS):
                step = executor.step()
                seen.update((c.source[0], c.target[0], c.rows > 0) for c in step.copies)
                seen["mixed"] += len(set(step.inputs["host_request_types"].tolist())) == 2
                seen["history"] += any(s.kind == PREFILL and s.start > 0 for s in step.sequences[0])
                seen["graph"] += step.graph_key in keys
                keys.add(step.graph_key)
            seen["paused"] += executor.num_paused
            seen["left"] += any(None in blocks for r in executor.batch for blocks in r.blocks)
    assert seen["mixed"] > 50
    assert seen["history"] > 50
    assert seen["graph"] > 30
    assert seen["paused"] > 5
    assert seen["left"] > 0
    assert seen[PRIMARY, PRIMARY, True] > 10
    assert seen[PRIMARY, SECONDARY, False] > 10
    assert seen[SECONDARY, PRIMARY, False] > 2
    assert seen[SECONDARY, PRIMARY, True] > 0


@pytest.mark.parametrize(
    ("file", "text"),
    [
        ("include/tensorrt_llm/batch_manager/runtimeBuffers.h", f"CUDA_GRAPH_ROUND_SIZE{{{GRAPH_ROUNDING}}};"),
        ("include/tensorrt_llm/kernels/kvCacheIndex.h", "<< (8 * sizeof(UnderlyingType) - 1);"),
        (
            "tensorrt_llm/kernels/kvCachePartialCopy.cu",
            "int flatIndex = (threadHead * tokensPerBlock + threadToken) * numHidden + threadHidden;",
        ),
        ("tensorrt_llm/batch_manager/kvCacheManager.cpp", "minTokensForBlockDetach = mWindowSize + mTokensPerBlock;"),
        (
            "tensorrt_llm/batch_manager/runtimeBuffers.cpp",
            "Ptr[batchIdx] = beginCompute + inputLength;",
        ),
        ("tensorrt_llm/batch_manager/runtimeBuffers.cpp", "SizeType32 pastKeyValueLength = sequenceLen - 1;"),
    ],
)
def test_the_executors_source_says_so(file, text):
    """What is played here after it, in the lines that say it."""
    source = fake_tensorrt_frontend.source()
    if source is None or not (source / "cpp" / file).is_file():
        pytest.skip(f"SAW_TENSORRT_LLM_SOURCE names no folder with cpp/{file}")
    assert text in (source / "cpp" / file).read_text()
