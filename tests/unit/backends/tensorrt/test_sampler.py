"""What the GPU's sampler packs for a step, over a stand-in for CUDA: what the kernel finds where it is told to look."""

import types

import numpy as np
import pytest

from saw_trtllm.errors import KernelError
from saw_trtllm.ops.sample import BANNED, LISTED, NOTHING, ROW, UNSEEN
from saw_trtllm.runtime.sampling import SamplingState
from saw_trtllm.runtime.sampling_params import SamplingParams
from tests.support.fakes import cuda as fake_cuda

VOCAB, SEQUENCES = 40_001, 5
WORDS = -(-VOCAB // 32)


@pytest.fixture
def gpu(monkeypatch):
    """A stand-in for CUDA, and a sampler over it."""
    cuda = fake_cuda.install(monkeypatch)
    from saw_trtllm.backends.tensorrt import sampler

    monkeypatch.setattr(sampler, "kernels", lambda: types.SimpleNamespace(MAX_VOCAB=1 << 18))
    made = sampler.GpuSampler(SEQUENCES, VOCAB)
    yield cuda, made, sampler.cuda.Stream()
    made.close()


def test_rows_lists_and_masks_of_each_step(gpu):
    """As sequences come and go and the masks outgrow their place; both sets of buffers in turn."""
    cuda, sampler, stream = gpu
    rng = np.random.default_rng(2)
    params = [
        SamplingParams(temperature=1.0, seed=1),
        SamplingParams(logit_bias={3: 1.5, 9: -2.0}),
        SamplingParams(min_p=0.1, repetition_penalty=1.5),
        SamplingParams(top_k=5, top_logprobs=3),
        SamplingParams(),
    ]
    for step in range(12):
        sampling: list[SamplingState | None] = []
        for i in rng.permutation(SEQUENCES)[: rng.integers(1, SEQUENCES + 1)]:
            mask = rng.integers(0, 2**32, WORDS, dtype=np.uint32) if rng.random() < step / 12 else None
            banned = (7,) if rng.random() < 0.3 else ()
            sampling.append(SamplingState(params[i], [4, 4], [3], banned, step, mask) if rng.random() < 0.8 else None)
        sampler.prepare(sampling)
        top = [0 if s is None else s.params.top_logprobs for s in sampling]
        assert [max(n, 0) for n in sampler.num_top] == (top if any(top) else [])
        sampler.upload(stream.handle)
        stream.synchronize()
        rows = cuda.array(sampler._rows.address, ROW, (SEQUENCES,))
        assert (rows["draw"][len(sampling) :] == NOTHING).all()
        for row, state in zip(rows, sampling, strict=False):
            if state is None:
                assert row["draw"] == NOTHING
                continue
            assert (row["index"], row["min_p"]) == (step, state.params.min_p or 0)
            assert (row["mask"] != 0) == (state.mask is not None)
            if state.mask is not None:
                np.testing.assert_array_equal(cuda.array(int(row["mask"]), np.uint32, (WORDS,)), state.mask)
            listed = cuda.array(int(row["listed"]), LISTED, (row["num_listed"],)) if row["num_listed"] else ()
            assert {x["token"]: (x["count"], x["bias"]) for x in listed} == expected_list(state)


@pytest.mark.parametrize("failing", ["cudaMalloc", "cudaMallocHost"])
def test_masks_that_find_no_memory_fail_alone(failing, gpu):
    cuda, sampler, _ = gpu
    few, held = [SamplingState(SamplingParams(), [4], [3], (7,))], cuda.everything()
    many = [SamplingState(SamplingParams(), [4], [3], mask=np.zeros(WORDS, np.uint32))] * SEQUENCES
    cuda.failing[failing] = fake_cuda.cudaError_t.cudaErrorMemoryAllocation
    for _ in range(2):
        with pytest.raises(KernelError, match="out of memory"):
            sampler.prepare(many)
    assert cuda.everything() == held
    cuda.failing.clear()
    for step in (few, many):
        for _ in range(2):
            sampler.prepare(step)
            assert (sampler._sets[sampler._turn]._staged.rows["mask"][: len(step)] != 0).all() == (step is many)


def expected_list(state):
    listed = {}
    if state.params.logit_bias:
        listed = {token: (UNSEEN, bias) for token, bias in state.params.logit_bias.items()}
    elif state.params.penalizes:
        listed = {4: (0, 0), 3: (1, 0)}
    return {**listed, **dict.fromkeys(state.banned, (BANNED, 0))}
