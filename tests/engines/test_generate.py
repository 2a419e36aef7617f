"""The example model's engines under the runtime: texts against the reference's, and against each other."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys

import numpy as np
import pytest

from saw_trtllm import LLM, KvCacheConfig, SamplingParams
from saw_trtllm.backends.registry import open_executor
from saw_trtllm.engine.config import EngineConfig
from saw_trtllm.errors import EngineError
from saw_trtllm.runtime.sampling import SamplingState
from tests.engines.cases import SERVED_CASES, TEXT_BLOCKS, TEXTS, TOKENS_PER_BLOCK, prompts, text_steps
from tests.support import ROOT


@pytest.fixture(scope="module", params=SERVED_CASES)
def served(request, work, supported):
    """A case, and its engine folder."""
    supported(SERVED_CASES[request.param])
    return request.param, SERVED_CASES[request.param].engine(work)


@pytest.fixture
def expected(served, reference):
    """The reference's greedy texts, and ``close``: so far apart may two logits be that change places.

    That is twice what rounding to the engine's dtype makes of the reference's. With rows in 4 bits a rounding that
    moves a code is seen by all tokens after it, so there it is some twenty times as much.
    """
    found = reference(SERVED_CASES[served[0]])
    return found | {"close": 2 * found["errors"].max()}


def greedy(max_tokens, **params):
    return SamplingParams(max_tokens=max_tokens, ignore_eos=True, return_generation_logits=True, **params)


def tokens_and_gaps(outputs):
    """Tokens, and how far the likeliest logit lay before the next."""
    top = [np.sort(o.outputs[0].generation_logits, axis=1)[:, -2:] for o in outputs]
    return [o.outputs[0].token_ids for o in outputs], [t[:, 1] - t[:, 0] for t in top]


def first_difference(a, b):
    return next((i for i, (x, y) in enumerate(zip(a, b, strict=True)) if x != y), None)


def test_200_greedy_tokens_are_the_references(served, expected):
    """Each step is given the reference's tokens, so that all 200 can be compared, and not those before a close one."""
    _, folder = served
    config = EngineConfig.load(folder)
    greedy = [SamplingState(SamplingParams(return_generation_logits=True), [1], [])] * TEXTS
    executor = open_executor(folder, config, KvCacheConfig(max_tokens=TEXTS * TEXT_BLOCKS * TOKENS_PER_BLOCK))
    try:
        outputs = [
            executor.launch(step, greedy, [False] * TEXTS).result()
            for step in text_steps(config.pool_layout, expected["tokens"])
        ]
    finally:
        executor.shutdown()
    tokens = np.array([output.token_ids for output in outputs]).T
    logits = np.array([np.concatenate(output.logits) for output in outputs]).transpose(1, 0, 2)
    np.testing.assert_array_equal(tokens, logits.argmax(axis=2))
    errors = np.abs(np.take_along_axis(logits, expected["top"], axis=2) - expected["values"])
    rms, allowed = (np.sqrt(np.square(x).mean()) for x in (errors, expected["errors"]))
    print(
        f"{served[0]}: rms {rms:.4f}, of rounding {allowed:.4f}; max {errors.max():.3f}, {expected['errors'].max():.3f}"
    )
    # Rounding there is of what a GEMM gives; those of TensorRT may sum in fp16 too.
    assert rms <= 3 * allowed
    gaps = expected["values"][..., 0] - expected["values"][..., 1]
    different = tokens != expected["tokens"]
    print(f"{served[0]}: {different.sum()} of {different.size} tokens differ, gaps {np.sort(gaps[different])[-3:]}")
    assert (gaps[different] <= expected["close"]).all()
    # The reference, rounded as the engine is, takes so many others; the engine rounds in more places.
    assert different.mean() < max(0.05, 3 * expected["rounded_differ"])


def test_64_requests_with_preemption_give_what_each_gives_alone(served, expected):
    _, folder = served
    # Short prompts and long texts: many are let in, and then outgrow a pool of 32 blocks.
    texts = prompts(64, 40, seed=8)
    params = [greedy(int(n)) for n in np.random.default_rng(9).integers(40, 160, 64)]
    with LLM(folder, kv_cache_config=KvCacheConfig(max_tokens=1024, deterministic=True)) as llm:
        together, _ = tokens_and_gaps(llm.generate(texts, params))
        preemptions = llm.stats().preemptions_total
    with LLM(folder, kv_cache_config=KvCacheConfig(max_tokens=1024, enable_block_reuse=False)) as llm:
        alone, gaps = tokens_and_gaps([llm.generate(text, p) for text, p in zip(texts, params, strict=True)])
    found = {i: first_difference(a, b) for i, (a, b) in enumerate(zip(together, alone, strict=True)) if a != b}
    print(
        f"{served[0]}: {preemptions} preemptions, {len(found)} of 64 differ, gaps",
        [gaps[i][at] for i, at in found.items()],
    )
    assert preemptions > 0
    assert all(gaps[i][at] <= expected["close"] for i, at in found.items())


def test_a_fresh_process_gives_the_same(served):
    _, folder = served
    texts = prompts(4, 300, seed=10)
    with LLM(folder, kv_cache_config=KvCacheConfig(max_tokens=4096, deterministic=True)) as llm:
        here = [llm.generate(text, greedy(50)).outputs[0].token_ids for text in texts]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])}
    command = [sys.executable, "-m", "tests.engines.fresh", str(folder), "50"]
    done = subprocess.run(
        command, input=json.dumps(texts), env=environment, capture_output=True, text=True, check=False, timeout=120
    )
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout) == here


def test_a_seed_gives_the_same_text_again(served):
    _, folder = served
    text = prompts(1, 200, seed=11)[0]
    params = [
        SamplingParams(max_tokens=30, temperature=1.2, top_p=0.9, seed=seed, ignore_eos=True) for seed in (1, 1, 2)
    ]
    with LLM(folder, kv_cache_config=KvCacheConfig(max_tokens=4096, deterministic=True)) as llm:
        found = [llm.generate(text, p).outputs[0].token_ids for p in params]
    assert found[0] == found[1]
    assert found[0] != found[2]


def test_context_logits_are_all_of_the_prompts(served):
    _, folder = served
    text = prompts(1, 400, seed=12)[0]
    with LLM(folder, kv_cache_config=KvCacheConfig(max_tokens=4096)) as llm:
        output = llm.generate(
            text, SamplingParams(max_tokens=1, return_context_logits=True, return_generation_logits=True)
        )
    assert output.context_logits.shape == (len(text), 1024)
    np.testing.assert_array_equal(output.context_logits[-1:], output.outputs[0].generation_logits)


@pytest.mark.parametrize("damage", ["half", "text", "nothing"])
def test_a_damaged_engine_is_rejected_in_one_sentence(damage, work, tmp_path):
    folder = shutil.copytree(SERVED_CASES["saw_int4"].engine(work), tmp_path / "engine")
    file = folder / "rank0.engine"
    whole = file.read_bytes()
    file.write_bytes({"half": whole[: len(whole) // 2], "text": b"no engine" * 999, "nothing": b""}[damage])
    with pytest.raises(EngineError, match=r"rank0.engine cannot be read as an engine \(.+\): build it anew") as error:
        LLM(folder, verify=False)
    assert "\n" not in str(error.value)


def test_too_little_memory_says_how_much(work):
    folder = SERVED_CASES["saw_int4"].engine(work)
    with pytest.raises(
        EngineError, match=r"^the KV cache gets .* one sequence of max_seq_len 1024 takes .* raise --kv_"
    ):
        LLM(folder, kv_cache_config=KvCacheConfig(free_gpu_memory_fraction=1e-6))
