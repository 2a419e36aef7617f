"""Blocks behind a window are given back: the texts are those of an engine that keeps them."""

from unittest import mock

import pytest

from saw_trtllm import LLM, KvCacheConfig, SamplingParams
from saw_trtllm.engine.config import EngineConfig
from tests.engines.cases import Case, num_tokens, prompts
from tests.engines.models import VOCAB


@pytest.mark.parametrize("kv", ["saw_int4", "fp16"])
@pytest.mark.parametrize("family", ["mistral", "gemma2", "gemma3"])
def test_a_window_reads_no_block_that_was_given_back(family, kv, work, supported):
    """In a pool that is too small to leave blocks alone that are free; greedy, turn after turn."""
    case = Case(family, 128, kv)
    supported(case)
    folder = case.engine(work)
    config = EngineConfig.load(folder)
    assert any(config.windows)
    everything = property(lambda self: [None] * self.pool_layout.num_tables)
    begun = [[token % (VOCAB - 3) + 3 for token in prompt] for prompt in prompts(8, 300)]
    params = SamplingParams(max_tokens=60, ignore_eos=True)

    def converse(tokens):
        found = begun
        cache = KvCacheConfig(max_tokens=tokens, deterministic=True)
        with LLM(folder, kv_cache_config=cache, prefill_chunk=64) as llm:
            for _ in range(2):
                outputs = llm.generate(found, params)
                found = [[*p, *o.outputs[0].token_ids, 7] for p, o in zip(found, outputs, strict=True)]
        return found

    bounded = converse(1024)
    with mock.patch.object(EngineConfig, "windows", everything):
        assert bounded == converse(2 * num_tokens(config) + 8 * 512)
