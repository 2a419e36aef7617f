"""Windows bound what a sequence holds, and change nothing of what is computed."""

import json
from types import SimpleNamespace

import numpy as np
import psutil
import pytest
import torch

from saw_trtllm import LLM, KvCacheConfig, SamplingParams
from saw_trtllm.build import build, plan_build
from saw_trtllm.engine.config import EngineConfig
from saw_trtllm.plan.options import BuildOptions
from tests.support.models import make_hf_model
from tests.support.tolerance import model_rounding

WINDOWED = {
    "mistral": {},
    "qwen2": {"use_sliding_window": True, "sliding_window": 9, "max_window_layers": 1},
    "gemma2": {},
    "gemma3": {"num_hidden_layers": 7, "sliding_window_pattern": 3},
}
LIMITS = {"max_batch_size": 4, "max_num_tokens": 64, "max_seq_len": 200, "tokens_per_block": 16, "dtype": "float32"}
LIMITS |= {"gather_all_token_logits": True, "backend": "reference"}
#: A pool of two sequences of max_seq_len, and one that leaves what was computed alone.
TOKENS, MANY = 400, 20_000


@pytest.fixture(scope="module", params=WINDOWED)
def family(request, tmp_path_factory):
    """Its name, the model of transformers, and engines by their cache: bounded, and with one table for all layers."""
    folder = tmp_path_factory.mktemp(request.param)
    model_dir, model = make_hf_model(folder, request.param, **WINDOWED[request.param])
    engines = {}
    for kv in ("fp16", "saw_int4"):
        for bounded in (True, False):
            engine = engines[kv, bounded] = folder / f"{kv}-{bounded}"
            build(plan_build(BuildOptions(model_dir=model_dir, output_dir=engine, kv=kv, **LIMITS)))
            if not bounded:
                config = json.loads((engine / "config.json").read_text())
                assert config["saw_int4"]["kv_groups"]
                config["saw_int4"]["kv_groups"] = []
                (engine / "config.json").write_text(json.dumps(config))
    return request.param, model, engines


def turns(llm):
    """Conversations of three turns whose prompts begin alike, several at a time, beside each other."""
    rng = np.random.default_rng(5)
    system = rng.integers(3, 203, 70).tolist()
    prompts = [[*system, *rng.integers(3, 203, 5 + 9 * i).tolist()] for i in range(3)]
    params = SamplingParams(max_tokens=12, ignore_eos=True, return_generation_logits=True)
    found, reused = [], 0
    for _ in range(3):
        outputs = llm.generate(prompts, params)
        reused += sum(o.num_reused_tokens for o in outputs)
        found += [(o.outputs[0].token_ids, o.outputs[0].generation_logits) for o in outputs]
        prompts = [[*p, *o.outputs[0].token_ids, 7] for p, o in zip(prompts, outputs, strict=True)]
    return found, reused


@pytest.mark.parametrize("kv", ["fp16", "saw_int4"])
def test_texts_and_logits_are_those_of_unbounded_tables(kv, family):
    """To the last bit, where sequences preempt each other and where prefixes are reused in whole chunks."""
    _, _, engines = family
    small = {"max_tokens": TOKENS, "deterministic": True, "host_cache_size": 1 << 22}
    for options in (small, {"max_tokens": MANY, "deterministic": True}):
        found = {}
        for bounded in (True, False):
            cache = KvCacheConfig(**options)
            with LLM(engines[kv, bounded], kv_cache_config=cache, prefill_chunk=32, verify=False) as llm:
                found[bounded], reused = turns(llm)
            assert reused or options is small
        for (ours, logits), (theirs, expected) in zip(found[True], found[False], strict=True):
            assert ours == theirs
            assert np.array_equal(logits, expected)


def test_texts_are_those_of_transformers(family):
    """A prompt and a text of several windows, in chunks, found again in part: greedy, from an exact cache."""
    _, model, engines = family
    rng = np.random.default_rng(8)
    prompts = [rng.integers(3, 203, n).tolist() for n in (100, 60)]
    with LLM(engines["fp16", True], kv_cache_config=KvCacheConfig(max_tokens=MANY), prefill_chunk=32) as llm:
        params = SamplingParams(max_tokens=40, ignore_eos=True)
        for turn in range(2):
            outputs = llm.generate(prompts, params)
            for i, output in enumerate(outputs):
                assert turn == 0 or output.num_reused_tokens >= len(prompts[i]) - 42
                ids = torch.tensor([[*prompts[i], *output.outputs[0].token_ids]])
                with torch.no_grad():
                    logits = model(ids).logits[0, len(prompts[i]) - 1 : -1]
                best = logits.max(-1).values - logits.gather(1, ids[0, len(prompts[i]) :, None])[:, 0]
                assert best.max() <= 2 * model_rounding(logits)  # the largest, or one as large
                prompts[i] = [*prompts[i], *output.outputs[0].token_ids, 5]
            prompts = [p[:150] for p in prompts]
            params = SamplingParams(max_tokens=20, ignore_eos=True)


def test_a_sequence_holds_its_windows_and_no_more(family):
    """While it decodes: of tables with a window that and a block, of others all."""
    _, _, engines = family
    config = EngineConfig.load(engines["saw_int4", True])
    assert any(config.windows)
    with LLM(engines["saw_int4", True], kv_cache_config=KvCacheConfig(max_tokens=TOKENS)) as llm:
        used = []
        result = llm.generate_async([5] * 120, SamplingParams(max_tokens=60, ignore_eos=True), streaming=True)
        result.subscribe(lambda: used.append(llm.stats().used_blocks))  # by the engine, at each step
        result.result()
        most = max(used)
    assert 0 < most <= config.blocks_for(180) < -(-180 // 16) * len(config.windows)


def test_a_pool_takes_its_share_of_the_memory_and_no_more(family, monkeypatch):
    """Where that is less than a sequence of max_seq_len takes, too."""
    _, _, engines = family
    engine = engines["saw_int4", True]
    available = 10 * EngineConfig.load(engine).block_bytes
    monkeypatch.setattr(psutil, "virtual_memory", lambda: SimpleNamespace(available=available))
    with LLM(engine, kv_cache_config=KvCacheConfig(free_gpu_memory_fraction=0.5)) as llm:
        assert llm.executor.num_blocks == 5
