"""An executor that runs beside the host: the same outputs as one that does not, however requests end."""

import logging
import re
import threading
import time
from dataclasses import replace

import numpy as np
import pytest

from saw_trtllm import GuidedDecodingParams, KvCacheConfig, SamplingParams
from saw_trtllm import llm as llm_module
from saw_trtllm.errors import EngineError
from tests.support.executor.asynchronous import AsyncExecutor
from tests.support.turns import generate_at_once

STEM = "import os\nimport sys\n\n\nclass Node:\n    def __init__(self, name, children=()):\n        self.name = name\n"
ENDLESS = SamplingParams(max_tokens=1500, ignore_eos=True)


@pytest.fixture
def open_async(open_llm, monkeypatch):
    """Give an LLM over an asynchronous executor, and that executor."""

    def open_(kv="saw_int4", **options):
        with monkeypatch.context() as patched:
            plain = llm_module.open_executor
            patched.setattr(llm_module, "open_executor", lambda *args: AsyncExecutor(plain(*args)))
            llm = open_llm(kv, **options)
        return llm, llm._core._executor

    return open_


def wait_until(condition):
    for _ in range(1200):
        if condition():
            return
        time.sleep(0.05)
    raise AssertionError("it does not come about")


def assert_nothing_held(llm):
    wait_until(lambda: llm.stats().used_blocks == 0)
    stats = llm.stats()
    assert (stats.num_running, stats.num_waiting) == (0, 0)
    llm._scheduler.blocks.check()


def prompts_of(count, tokenizer, shared=(0, 20, 70)):
    """Prompts with common beginnings of so many tokens."""
    ids, rng = tokenizer.encode(STEM * 4), np.random.default_rng(12)
    return [ids[: shared[i % len(shared)]] + rng.integers(10, 1000, 1 + 5 * i).tolist() for i in range(count)]


@pytest.mark.parametrize("kv", ["fp16", "int4", "saw_int4"])
def test_tokens_are_those_of_a_synchronous_one(open_llm, open_async, kv):
    """With prefixes that are reused, chunks, a cache that is too small, and texts of all lengths."""
    plain = open_llm(kv, prefill_chunk=32)
    prompts = prompts_of(6, plain.tokenizer)
    params = [
        SamplingParams(max_tokens=60 - 7 * i, ignore_eos=True, **({"temperature": 1.0, "seed": i} if i % 2 else {}))
        for i in range(6)
    ]
    expected = [o.outputs[0] for o in plain.generate(prompts, params)]
    llm, executor = open_async(kv, prefill_chunk=32)
    for _ in range(2):
        assert [o.outputs[0] for o in llm.generate(prompts, params)] == expected
    assert llm.stats().reused_tokens_total > 60
    assert executor.num_ahead > 30
    assert executor.num_unknown > 50
    assert_nothing_held(llm)

    llm, executor = open_async(kv, prefill_chunk=32, kv_cache_config=KvCacheConfig(256, deterministic=True))
    assert [o.outputs[0] for o in generate_at_once(llm, prompts, params)] == expected
    assert llm.stats().preemptions_total > 0
    assert executor.num_ahead > 10
    assert_nothing_held(llm)


def test_texts_end_where_they_end(open_llm, open_async):
    """By tokens, strings, runs, late, with penalties and logits; each beside all others, streamed and whole."""
    plain = open_llm("fp16")
    text = plain.generate(STEM, SamplingParams(max_tokens=24, ignore_eos=True)).outputs[0]
    token, string = text.token_ids[9], text.text[15:19]
    params = [
        SamplingParams(max_tokens=24, end_id=token),
        SamplingParams(max_tokens=24, stop_token_ids=[7, token], logprobs=True),
        SamplingParams(max_tokens=24, stop=["\0never", string], ignore_eos=True),
        SamplingParams(max_tokens=24, stop=string, include_stop_str_in_output=True, ignore_eos=True),
        SamplingParams(max_tokens=24, stop_token_sequences=[text.token_ids[6:9]], ignore_eos=True),
        SamplingParams(max_tokens=24, min_tokens=20, end_id=token),
        SamplingParams(max_tokens=24, min_tokens=12, end_id=token, temperature=1.0, seed=5),
        SamplingParams(max_tokens=24, top_p=0.9, seed=3, logprobs=True, ignore_eos=True),
        SamplingParams(max_tokens=1),
        SamplingParams(max_tokens=2, ignore_eos=True),
    ]
    expected = [o.outputs[0] for o in plain.generate([STEM] * len(params), params)]
    assert {o.finish_reason for o in expected} == {"stop", "length"}
    llm, executor = open_async("fp16")
    assert [o.outputs[0] for o in llm.generate([STEM] * len(params), params)] == expected
    handles = [llm.generate_async(STEM, p, streaming=True) for p in params]
    for handle, whole in zip(handles, expected, strict=True):
        last = list(handle)[-1].outputs[0]
        assert (last.text, last.token_ids, last.finish_reason, last.stop_reason, last.logprobs) == (
            whole.text,
            whole.token_ids,
            whole.finish_reason,
            whole.stop_reason,
            whole.logprobs,
        )
    assert executor.num_ahead > 20
    assert_nothing_held(llm)


#: Texts whose draws depend on the token before, and one that ends late and does not.
DEPENDENT = [
    SamplingParams(max_tokens=15, ignore_eos=True, repetition_penalty=1.3),
    SamplingParams(max_tokens=15, ignore_eos=True, presence_penalty=1.0, temperature=1.0),
    SamplingParams(max_tokens=15, ignore_eos=True, frequency_penalty=0.7, temperature=1.0, seed=8),
    SamplingParams(max_tokens=15, guided_decoding=GuidedDecodingParams(regex="[a-f]{2,40}"), temperature=1.0, seed=3),
    SamplingParams(max_tokens=15, guided_decoding=GuidedDecodingParams(regex="(yes|no|perhaps)")),
    SamplingParams(max_tokens=15, ignore_eos=True, bad=["e", "se"], top_p=0.9, temperature=1.5, seed=4),
    SamplingParams(max_tokens=30, ignore_eos=True),
]


def test_what_depends_on_the_last_token_is_drawn_late_and_holds_nobody_up(open_llm, open_async):
    """The executor checks that no draw is asked for that depends on a token that is not known."""
    prompts = [STEM] * len(DEPENDENT)
    expected = [o.outputs[0] for o in open_llm().generate(prompts, DEPENDENT)]
    assert len({tuple(o.token_ids[:15]) for o in expected}) == len(DEPENDENT)
    assert re.fullmatch("[a-f]{2,40}", expected[3].text)
    assert expected[4].text in ("yes", "no", "perhaps")
    llm, executor = open_async()
    with llm._core._changed:  # all begin in one step
        handles = [llm.generate_async(prompt, params) for prompt, params in zip(prompts, DEPENDENT, strict=True)]
    assert [h.result(60).outputs[0] for h in handles] == expected
    assert executor.num_ahead >= 29  # each step but the first, as without them
    assert 13 <= executor.num_late <= 15
    assert_nothing_held(llm)


def test_a_text_that_ends_before_its_late_draw_draws_nothing(open_async):
    """It ends with the token that the draw would have depended on; those beside it are what they are alone."""
    llm, executor = open_async("fp16")
    alone = [llm.generate(STEM, p).outputs[0] for p in DEPENDENT]
    end = alone[0].token_ids[6]
    first = next(i for i, token in enumerate(alone[0].token_ids) if token == end)
    params = [replace(DEPENDENT[0], ignore_eos=False, end_id=end), *DEPENDENT[1:]]
    executor.num_rows = 0
    found = [o.outputs[0] for o in llm.generate([STEM] * len(params), params)]
    assert (found[0].token_ids, found[0].finish_reason) == (alone[0].token_ids[:first], "stop")
    assert found[1:] == alone[1:]
    assert_nothing_held(llm)


@pytest.mark.parametrize("where", ["launch", "result"])
def test_a_failing_step_ends_no_late_draw_of_others(open_async, caplog, where):
    """The step before fails, or the next one: what is left of the step in flight is drawn."""
    params = SamplingParams(max_tokens=12, ignore_eos=True, repetition_penalty=1.3)
    llm, executor = open_async("fp16", kv_cache_config=KvCacheConfig(enable_block_reuse=False))
    expected = llm.generate([8, 9], params)
    executor.fail_in, executor.fail_on = where, 1000
    with caplog.at_level(logging.CRITICAL):
        executor.gate.clear()
        broken = llm.generate_async([5, 1000], params)
        if where == "result":
            wait_until(lambda: len(executor._under_way) == 2)
        good = llm.generate_async([8, 9], params)
        executor.gate.set()
        with pytest.raises(EngineError):
            broken.result(60)
        if where == "result":
            assert good.result(60).outputs == expected.outputs
    assert_nothing_held(llm)
    assert llm.generate([8, 9], params).outputs == expected.outputs


def test_logits_are_those_of_a_synchronous_one(open_llm, open_async):
    wants = SamplingParams(max_tokens=9, ignore_eos=True, return_context_logits=True, return_generation_logits=True)
    context = SamplingParams(max_tokens=9, ignore_eos=True, return_context_logits=True)
    plain = open_llm(prefill_chunk=32)
    prompts = prompts_of(3, plain.tokenizer)
    params = [wants, context, SamplingParams(max_tokens=20, ignore_eos=True)]
    expected = plain.generate(prompts, params)
    llm, executor = open_async(prefill_chunk=32)
    for got, want in zip(llm.generate(prompts, params)[:2], expected[:2], strict=True):
        np.testing.assert_array_equal(got.context_logits, want.context_logits)
        assert got.outputs[0].token_ids == want.outputs[0].token_ids
    generation = llm.generate(prompts[0], wants).outputs[0].generation_logits
    np.testing.assert_array_equal(generation, expected[0].outputs[0].generation_logits)
    assert executor.num_unknown > 20


def test_nothing_is_computed_past_max_tokens_and_one_row_past_an_end(open_llm, open_async):
    llm, executor = open_async("fp16")
    drawn = {"max_tokens": 8, "temperature": 1.5, "seed": 2}
    text = llm.generate([5, 6, 7], SamplingParams(ignore_eos=True, **drawn)).outputs[0].token_ids
    assert executor.num_rows == 8
    end = next(i for i in range(2, 8) if text[i] not in text[:i])
    executor.num_rows = 0
    llm.generate([5, 6, 7], SamplingParams(end_id=text[end], **drawn))
    assert_nothing_held(llm)
    assert executor.num_rows == end + 2


def test_aborted_while_a_step_is_under_way(open_async):
    """What the step writes to is held until it is done; the others come to no harm."""
    llm, executor = open_async(kv_cache_config=KvCacheConfig(max_tokens=2048))
    expected = llm.generate(STEM, SamplingParams(max_tokens=60, ignore_eos=True)).outputs[0]
    handles = [llm.generate_async(STEM, ENDLESS, streaming=True) for _ in range(4)]
    kept = llm.generate_async(STEM, SamplingParams(max_tokens=60, ignore_eos=True))
    for handle in handles:
        next(iter(handle))
    executor.gate.clear()
    wait_until(lambda: len(executor._under_way) == 2)  # the second of them cannot end
    for handle in handles:
        handle.abort()
    used = llm.stats().used_blocks
    wait_until(lambda: not llm._core._aborted or len(executor._under_way) == 2)
    assert llm.stats().used_blocks >= used > 0
    executor.gate.set()
    assert {h.result(60).outputs[0].finish_reason for h in handles} == {"cancelled"}
    assert kept.result(60).outputs[0] == expected
    assert_nothing_held(llm)


@pytest.mark.parametrize("where", ["launch", "result"])
def test_a_failing_step_ends_its_requests_alone(open_async, caplog, where):
    said = {"launch": "it would not start", "result": "a bit fell over"}[where]
    params = SamplingParams(max_tokens=12, ignore_eos=True)
    llm, executor = open_async("fp16", kv_cache_config=KvCacheConfig(enable_block_reuse=False))
    expected = llm.generate([[5, 6, 7], [8, 9]], params)
    assert 1000 not in expected[0].outputs[0].token_ids + expected[1].outputs[0].token_ids
    executor.fail_in, executor.fail_on = where, 1000
    with caplog.at_level(logging.CRITICAL):
        running = llm.generate_async([5, 6, 7], ENDLESS, streaming=True)
        next(iter(running))
        broken = llm.generate_async([5, 1000], params)
        with pytest.raises(EngineError, match=said):
            broken.result(60)
        with pytest.raises(EngineError, match=said):  # it was part of the same step
            running.result(60)
        assert_nothing_held(llm)
        late = [llm.generate_async(p, params) for p in ([5, 6, 7], [8, 9])]
        assert [h.result(60).outputs for h in late] == [o.outputs for o in expected]
    assert_nothing_held(llm)


def test_a_request_of_no_failing_step_goes_on(open_async, caplog):
    """It comes while the step that fails is under way, and is part of the next one."""
    params = SamplingParams(max_tokens=12, ignore_eos=True)
    llm, executor = open_async("fp16")
    expected = llm.generate([8, 9], params)
    executor.fail_in, executor.fail_on = "result", 1000
    with caplog.at_level(logging.CRITICAL):
        executor.gate.clear()
        broken = llm.generate_async([5, 1000], params)
        wait_until(lambda: len(executor._under_way) == 2)  # the broken one's prompt, and its first decode
        good = llm.generate_async([8, 9], params)
        executor.gate.set()
        with pytest.raises(EngineError, match="a bit fell over"):
            broken.result(60)
        assert good.result(60).outputs == expected.outputs
    assert_nothing_held(llm)


def test_shutdown_while_a_step_is_under_way(open_async):
    llm, executor = open_async()
    handles = [llm.generate_async(STEM, ENDLESS, streaming=bool(i % 2)) for i in range(4)]
    next(iter(handles[1]))
    executor.gate.clear()
    closing = threading.Thread(target=llm.shutdown)
    closing.start()
    time.sleep(0.2)
    assert not executor.is_shut_down
    executor.gate.set()
    closing.join(60)
    assert executor.is_shut_down
    assert {h.result(60).outputs[0].finish_reason for h in handles} == {"cancelled"}
    assert llm.stats().used_blocks == 0


def test_a_broken_scheduler_waits_for_the_step_and_leaves_nobody_waiting(open_async, monkeypatch):
    llm, executor = open_async()
    handle = llm.generate_async(STEM, ENDLESS, streaming=True)
    next(iter(handle))

    def broken():
        raise RuntimeError("a bug")

    monkeypatch.setattr(llm._scheduler, "schedule", broken)
    with pytest.raises(EngineError, match="a bug"):
        handle.result(60)
    wait_until(lambda: executor.is_shut_down)
