import asyncio
import gc
import logging
import subprocess
import sys
import threading
import time
from dataclasses import replace

import numpy as np
import pytest
import torch

from saw_trtllm import LLM, KvCacheConfig, SamplingParams
from saw_trtllm.checkpoint import Checkpoint, save_checkpoint
from saw_trtllm.errors import ConfigError, EngineError, QueueFullError, RequestError, ShutdownError
from saw_trtllm.runtime.block_manager import BlockManager
from saw_trtllm.runtime.detokenizer import Detokenizer
from saw_trtllm.runtime.engine_core import EngineCore
from saw_trtllm.runtime.generation_result import GenerationResult
from saw_trtllm.runtime.output_queue import OutputQueue
from saw_trtllm.runtime.request import Request
from saw_trtllm.runtime.sequence import Sequence
from saw_trtllm.runtime.tokenizer import Tokenizer
from tests.support.example import EXAMPLE, build_example
from tests.support.turns import generate_at_once, held_steps

STEM = "import os\nimport sys\n\n\nclass Node:\n    def __init__(self, name, children=()):\n        self.name = name\n"
ENDLESS = SamplingParams(max_tokens=1500, ignore_eos=True)


def requests(count, max_tokens, shared=(0, 20, 64, 100, 200, 300)):
    """Prompts with common beginnings of so many tokens; every other one sampled."""
    ids = Tokenizer.load(EXAMPLE).encode(STEM * 8)
    rng = np.random.default_rng(11)
    prompts, params = [], []
    for i in range(count):
        prompts.append(ids[: shared[i % len(shared)]] + rng.integers(10, 1000, rng.integers(1, 30)).tolist())
        sampled = {"temperature": 1.0, "seed": i} if i % 2 else {}
        params.append(SamplingParams(max_tokens=max_tokens, ignore_eos=True, **sampled))
    return prompts, params


def token_ids(outputs):
    return [o.outputs[0].token_ids for o in outputs]


# -- one and the same text, whatever else runs


@pytest.mark.parametrize(("kv", "count"), [("fp16", 6), ("int4", 6), ("saw_int4", 24)])
def test_batch_and_reuse_do_not_change_a_token(open_llm, kv, count):
    prompts, params = requests(count, 30)
    llm = open_llm(kv, prefill_chunk=64, kv_cache_config=KvCacheConfig(enable_block_reuse=False))
    alone = token_ids(llm.generate(p, s) for p, s in zip(prompts, params, strict=True))
    assert all(len(t) == 30 for t in alone)
    assert len(set(map(tuple, alone))) >= count - 1  # greedy texts of a small model may run into one loop
    assert token_ids(llm.generate(prompts, params)) == alone
    assert llm.stats().reused_tokens_total == 0

    llm = open_llm(kv, prefill_chunk=64)
    assert token_ids(llm.generate(prompts, params)) == alone
    assert token_ids(llm.generate(prompts, params)) == alone
    assert llm.stats().reused_tokens_total > 100


@pytest.mark.parametrize("kv", ["fp16", "saw_int4"])
def test_what_is_deterministic_is_found_in_whole_chunks_of_every_cache(open_llm, kv):
    """A GPU's products round by their number of rows, so that the rest of a prompt must have as many as before."""
    llm = open_llm(kv, prefill_chunk=64, kv_cache_config=KvCacheConfig(deterministic=True))
    llm.generate([5] * 150, SamplingParams(max_tokens=60, ignore_eos=True))
    assert llm.generate([5] * 150, SamplingParams(max_tokens=2)).num_reused_tokens == 128


def test_no_step_waits_for_a_prompts_keys(open_llm, monkeypatch):
    """They are worked out in the thread that sends the prompt, whatever its length and salt."""
    busy, extend = [], BlockManager._extend

    def watched(self, table, tokens, start=0):
        known = len(table.keys)
        extend(self, table, tokens, start)
        busy.extend([threading.current_thread().name] * (len(table.keys) - known))

    monkeypatch.setattr(BlockManager, "_extend", watched)
    llm = open_llm(kv_cache_config=KvCacheConfig())
    llm.generate({"prompt_token_ids": [5] * 100, "cache_salt": "mine"}, SamplingParams(max_tokens=2))
    assert busy == [threading.current_thread().name] * 3


@pytest.mark.parametrize("kv", ["fp16", "saw_int4"])
def test_preemption_does_not_change_a_token(open_llm, kv):
    prompts, params = requests(6, 60, shared=(0, 20, 70))
    llm = open_llm(kv, prefill_chunk=32)
    alone = token_ids(llm.generate(p, s) for p, s in zip(prompts, params, strict=True))
    for reuse in (True, False):
        llm = open_llm(
            kv, prefill_chunk=32, kv_cache_config=KvCacheConfig(256, enable_block_reuse=reuse, deterministic=True)
        )
        assert token_ids(generate_at_once(llm, prompts, params)) == alone
        assert llm.stats().preemptions_total > 0


@pytest.mark.parametrize("kv", ["fp16", "saw_int4"])
def test_a_conversation_finds_its_own_text_and_a_salt_keeps_it_apart(open_llm, kv):
    """What is reused of the second turn: all of the first but the last token, which was drawn and never computed."""
    llm, params = open_llm(kv, kv_cache_config=KvCacheConfig()), SamplingParams(max_tokens=20, ignore_eos=True)
    prompt = llm.tokenizer.encode(STEM)
    first = llm.generate(prompt, params).outputs[0].token_ids
    before = llm.stats().reused_tokens_total
    again = [*prompt, *first, *prompt]
    output = llm.generate(again, params)
    second = output.outputs[0].token_ids
    assert output.num_reused_tokens == len(prompt) + len(first) - 1
    assert llm.stats().reused_tokens_total - before == len(prompt) + len(first) - 1
    if kv == "fp16":  # rows of an exact cache are what a prefill would have computed
        with_none = open_llm(kv, kv_cache_config=KvCacheConfig(enable_block_reuse=False))
        assert second == with_none.generate(again, params).outputs[0].token_ids
    before = llm.stats().reused_tokens_total
    llm.generate({"prompt_token_ids": again, "cache_salt": "another"}, params)
    assert llm.stats().reused_tokens_total == before


def test_chunks_do_not_change_a_token_of_an_exact_cache(open_llm):
    prompts, params = requests(8, 10)
    texts = [token_ids(open_llm("fp16", prefill_chunk=c).generate(prompts, params)) for c in (32, 96, 512)]
    assert texts[0] == texts[1] == texts[2]


def test_the_order_of_queueing_does_not_change_a_token(open_llm):
    """In a cache that is too small for all: queued in another order than they were made in, and by threads."""
    prompts, params = requests(4, 60, shared=(0, 20, 70))
    alone = token_ids(open_llm("fp16", prefill_chunk=32).generate(prompts, params))
    llm = open_llm("fp16", prefill_chunk=32, kv_cache_config=KvCacheConfig(224))
    made = [llm._inputs.requests(p, s, streaming=False) for p, s in zip(prompts, params, strict=True)]
    with llm._core._changed:  # no step begins before all are queued
        results = [llm._submit(request) for request in reversed(made)]
    assert token_ids(r.result() for r in results) == alone[::-1]
    assert llm.stats().preemptions_total > 0

    texts = {}

    def work(i):
        texts[i] = token_ids([llm.generate(prompts[i], params[i])])[0]

    threads = [threading.Thread(target=work, args=(i,)) for i in range(4)]
    for t in threads:
        t.start()
    for t in threads:
        t.join()
    assert texts == dict(enumerate(alone))


def test_one_seed_one_text(open_llm):
    llm = open_llm()
    sampled = [SamplingParams(max_tokens=20, temperature=1.0, seed=s, ignore_eos=True) for s in (1, 2, 1, None, 0)]
    a, b, c, d, e = token_ids(llm.generate([STEM] * 5, sampled))
    assert a == c != b
    assert d == e


# -- outputs


def test_generate_gives_what_it_got(open_llm):
    llm = open_llm()
    output = llm.generate(STEM, SamplingParams(max_tokens=5))
    assert output.prompt == STEM
    assert output.prompt_token_ids == llm.tokenizer.encode(STEM)
    assert output.finished
    assert output.outputs[0].index == 0
    many = llm.generate(
        [STEM, output.prompt_token_ids, np.array(output.prompt_token_ids)], SamplingParams(max_tokens=5)
    )
    assert [o.prompt for o in many] == [STEM, None, None]
    assert len({o.outputs[0].text for o in many}) == 1
    assert llm.generate(output.prompt_token_ids, SamplingParams(max_tokens=5)).outputs == many[1].outputs
    assert llm.generate([]) == []
    assert len(llm.generate(STEM).outputs[0].token_ids) <= 32


def test_streamed_pieces_make_up_the_whole(open_llm):
    llm = open_llm()
    params = SamplingParams(max_tokens=60, temperature=1.5, seed=4, ignore_eos=True, logprobs=True)
    whole = llm.generate(STEM, params).outputs[0]
    pieces = [o.outputs[0] for o in llm.generate_async(STEM, params, streaming=True)]
    assert len(pieces) > 30
    assert "".join(p.text_diff for p in pieces) == pieces[-1].text == whole.text
    assert [i for p in pieces for i in p.token_ids_diff] == pieces[-1].token_ids == whole.token_ids
    assert [p.finish_reason for p in pieces] == [None] * (len(pieces) - 1) + ["length"]
    text, ids = "", []
    for p in pieces:
        text, ids = text + p.text_diff, ids + p.token_ids_diff
        assert (p.text, p.token_ids) == (text, ids)
        assert p.logprobs == whole.logprobs[: len(ids)]
    assert (whole.text_diff, whole.token_ids_diff) == (whole.text, whole.token_ids)


def test_what_is_handed_out_is_the_receivers_own(open_llm):
    llm = open_llm()
    params = SamplingParams(max_tokens=30, ignore_eos=True)
    expected = llm.generate(STEM, params).outputs[0].token_ids
    for output in llm.generate_async(STEM, params, streaming=True):
        piece = output.outputs[0]
        last = list(piece.token_ids)
        for ids in (output.prompt_token_ids, piece.token_ids, piece.token_ids_diff):
            ids[:] = [9] * 50
    assert last == expected


def test_stop_strings_end_the_text_before_them(open_llm):
    llm = open_llm()
    plain = llm.generate(STEM, SamplingParams(max_tokens=40, ignore_eos=True)).outputs[0].text
    stop = plain[20:24]
    end = plain.find(stop)
    for streaming in (False, True):
        for include in (False, True):
            params = SamplingParams(max_tokens=40, stop=["\0never", stop], include_stop_str_in_output=include)
            pieces = [o.outputs[0] for o in llm.generate_async(STEM, params, streaming)]
            assert pieces[-1].text == "".join(p.text_diff for p in pieces) == plain[: end + 4 * include]
            assert (pieces[-1].finish_reason, pieces[-1].stop_reason) == ("stop", stop)


def test_end_tokens_end_the_text_and_are_not_part_of_it(open_llm):
    llm = open_llm()
    plain = llm.generate(STEM, SamplingParams(max_tokens=30, ignore_eos=True, logprobs=True)).outputs[0]
    token = plain.token_ids[12]
    at = plain.token_ids.index(token)
    for params, reason in (({"end_id": token}, None), ({"stop_token_ids": [7, token]}, token)):
        ended = llm.generate(STEM, SamplingParams(max_tokens=30, logprobs=True, **params)).outputs[0]
        assert ended.token_ids == plain.token_ids[:at]
        assert ended.text == llm.tokenizer.decode(plain.token_ids[:at])
        assert ended.logprobs == plain.logprobs[:at]
        assert (ended.finish_reason, ended.stop_reason) == ("stop", reason)
    ignored = llm.generate(STEM, SamplingParams(max_tokens=30, end_id=token, ignore_eos=True)).outputs[0]
    assert ignored.token_ids == plain.token_ids


def test_runs_of_tokens_end_the_text(open_llm):
    llm = open_llm()
    plain = llm.generate(STEM, SamplingParams(max_tokens=30, ignore_eos=True)).outputs[0].token_ids
    params = SamplingParams(max_tokens=30, ignore_eos=True, stop_token_sequences=[[1, 2], plain[10:13]])
    stopped = llm.generate(STEM, params).outputs[0]
    end = next(i for i in range(30) if plain[i : i + 3] == plain[10:13]) + 3
    assert (stopped.token_ids, stopped.finish_reason, stopped.stop_reason) == (plain[:end], "stop", plain[12])


def test_min_tokens_puts_the_end_off(open_llm):
    llm = open_llm()
    plain = llm.generate(STEM, SamplingParams(max_tokens=20, ignore_eos=True)).outputs[0]
    token, stop = plain.token_ids[2], plain.text[3:5]
    late = llm.generate(STEM, SamplingParams(max_tokens=20, min_tokens=15, end_id=token)).outputs[0]
    assert len(late.token_ids) >= 15
    assert token not in late.token_ids[:15]
    late = llm.generate(STEM, SamplingParams(max_tokens=20, min_tokens=15, stop=stop, ignore_eos=True)).outputs[0]
    assert len(late.token_ids) >= 15
    assert late.token_ids == plain.token_ids[: len(late.token_ids)]


def test_ends_that_the_model_cannot_say_are_no_ends(open_llm):
    llm = open_llm()
    params = SamplingParams(max_tokens=4, min_tokens=2, end_id=10**9, stop_token_ids=[-5, 5000])
    plain = SamplingParams(max_tokens=4, ignore_eos=True)
    assert llm.generate(STEM, params).outputs[0].token_ids == llm.generate(STEM, plain).outputs[0].token_ids


@pytest.mark.parametrize("chunk", [32, 512])
def test_prompt_logprobs_are_those_of_the_prompts_logits(open_llm, chunk):
    """In chunks of the prompt and with its blocks in the cache already."""
    llm, prompt = open_llm(prefill_chunk=chunk), (EXAMPLE / "train.py").read_text()[:300]
    first = llm.generate(prompt, SamplingParams(max_tokens=2, return_context_logits=True))
    output = llm.generate(prompt, SamplingParams(max_tokens=2, prompt_logprobs=True))
    ids, logits = output.prompt_token_ids, first.context_logits.astype(np.float64)
    logprobs = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
    assert output.prompt_logprobs[0] is None
    np.testing.assert_allclose(output.prompt_logprobs[1:], logprobs[np.arange(len(ids) - 1), ids[1:]], atol=1e-9)
    assert output.context_logits is None


def test_logprobs_and_logits_agree(open_llm):
    llm = open_llm()
    params = SamplingParams(
        max_tokens=12,
        temperature=1.0,
        ignore_eos=True,
        logprobs=True,
        return_context_logits=True,
        return_generation_logits=True,
    )
    output = llm.generate(STEM, params)
    answer, count = output.outputs[0], len(output.prompt_token_ids)
    assert output.context_logits.shape == (count, 1024)
    assert answer.generation_logits.shape == (12, 1024)
    np.testing.assert_array_equal(output.context_logits[-1], answer.generation_logits[0])
    logits = answer.generation_logits.astype(np.float64)
    logprobs = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
    np.testing.assert_allclose(answer.logprobs, logprobs[np.arange(12), answer.token_ids], atol=1e-9)
    assert answer.cumulative_logprob == pytest.approx(sum(answer.logprobs))
    assert output.prompt_logprobs is None

    neither = llm.generate(STEM, SamplingParams(max_tokens=3))
    assert neither.context_logits is neither.outputs[0].generation_logits is neither.outputs[0].logprobs is None
    greedy = llm.generate(STEM, SamplingParams(max_tokens=5, return_generation_logits=True, ignore_eos=True)).outputs[0]
    assert greedy.generation_logits.argmax(-1).tolist() == greedy.token_ids


@pytest.mark.parametrize(("kv", "chunk"), [("fp16", 32), ("fp16", 256), ("saw_int4", 32)])
def test_logits_survive_preemption_chunks_and_company(open_llm, kv, chunk):
    """Beside requests that want none, in chunks, and preempted in the midst of the text."""
    prompts, _ = requests(4, 1, shared=(20, 70))
    params = SamplingParams(max_tokens=60, ignore_eos=True, return_context_logits=True, return_generation_logits=True)
    plain = SamplingParams(max_tokens=60, ignore_eos=True)
    llm = open_llm(kv, prefill_chunk=chunk)
    alone = [llm.generate(p, params) for p in prompts]
    llm = open_llm(
        kv, prefill_chunk=chunk, kv_cache_config=KvCacheConfig(256, enable_block_reuse=False, deterministic=True)
    )
    crowded = generate_at_once(llm, [q for p in prompts for q in (p, p)], [params, plain] * len(prompts))[::2]
    assert llm.stats().preemptions_total > 0
    for a, b in zip(alone, crowded, strict=True):
        np.testing.assert_array_equal(a.context_logits, b.context_logits)
        np.testing.assert_array_equal(a.outputs[0].generation_logits, b.outputs[0].generation_logits)


def test_a_prompt_begun_anew_gives_its_logits_once():
    """Preempted in the midst of its prompt, a request computes the first chunks twice."""
    params = SamplingParams(max_tokens=1, return_context_logits=True)
    outputs = OutputQueue()
    result = GenerationResult(0, outputs, abort=lambda: None)
    request = Request(Sequence(0, [5] * 5, params), None, set(), Detokenizer(None), False, outputs)
    logits = np.arange(10, dtype=np.float32).reshape(5, 2)
    for start, end in ((0, 2), (2, 4), (0, 2), (2, 4), (4, 5)):
        request.keep_logits(logits[start:end], start, samples=end == 5)
    assert request.push(7, 0.0)
    np.testing.assert_array_equal(result.result().context_logits, logits)


def test_logits_do_not_hold_those_of_the_whole_step(open_llm):
    """A view, kept until the request ends, would keep the logits of all that ran beside it."""
    llm, kept = open_llm(), []
    execute = llm._core._executor.execute

    def recording(*args):
        output = execute(*args)
        kept.extend(logits for logits in output.logits if logits is not None)
        return output

    llm._core._executor.execute = recording
    wants = SamplingParams(max_tokens=3, return_generation_logits=True, return_context_logits=True)
    llm.generate([STEM, STEM], [wants, SamplingParams(max_tokens=3)])
    assert len(kept) >= 3
    assert all(logits.base is None for logits in kept)


# -- async


def test_async_streams_side_by_side(open_llm):
    llm = open_llm()
    prompts = [f"def f{i}(x):\n    return" for i in range(24)]
    params = SamplingParams(max_tokens=20, ignore_eos=True)
    whole = [o.outputs[0].text for o in llm.generate(prompts, params)]

    async def read(prompt):
        return "".join([o.outputs[0].text_diff async for o in llm.generate_async(prompt, params, streaming=True)])

    async def read_all():
        return await asyncio.gather(*map(read, prompts))

    assert asyncio.run(read_all()) == whole
    assert asyncio.run(llm_aresult(llm, prompts[0], params)).outputs[0].text == whole[0]


async def llm_aresult(llm, prompt, params):
    return await llm.generate_async(prompt, params).aresult()


def test_a_step_has_been_handed_out_whole_when_it_wakes_anyone(open_llm):
    """Whoever takes the first text's piece finds the second's of the same step: each has no message of its own."""
    llm, seen = open_llm(), ([], [])
    params = SamplingParams(max_tokens=60, ignore_eos=True)
    with llm._core._changed:  # no step begins before both wait for it
        results = [llm.generate_async(STEM, params, streaming=True) for _ in seen]
        pieces = [result._outputs.pieces for result in results]
        for result, differences in zip(results, seen, strict=True):
            result.subscribe(lambda differences=differences: differences.append(len(pieces[0]) - len(pieces[1])))
    while llm.stats().num_running or llm.stats().num_waiting:
        time.sleep(0.01)
    first, second = (max(set(differences), key=differences.count) for differences in seen)
    assert first == second


def test_cancelled_in_the_midst(open_llm):
    llm = open_llm()

    async def read(streaming):
        pieces = []
        with held_steps(llm, first=20) as held:
            handle = llm.generate_async(STEM, ENDLESS, streaming=streaming)
            if not streaming:
                handle.abort()
                held.go_on.set()
            async for output in handle:
                pieces.append(output)
                if len(pieces) == 5:
                    handle.abort()
                    held.go_on.set()
        assert pieces[-1].finished
        assert pieces[-1].outputs[0].finish_reason == "cancelled"
        assert len(pieces[-1].outputs[0].token_ids) < ENDLESS.max_tokens
        assert "".join(p.outputs[0].text_diff for p in pieces) == pieces[-1].outputs[0].text
        return len(pieces)

    assert asyncio.run(read(streaming=True)) > 5
    assert asyncio.run(read(streaming=False)) == 1
    stats = llm.stats()
    assert (stats.num_running, stats.num_waiting, stats.used_blocks) == (0, 0, 0)


def test_cancelled_while_another_is_being_cancelled(open_llm):
    llm, later = open_llm(), []

    def begin_another():  # in the engine's thread: it is woken for each piece, the cancelled one too
        if not later and held.aborted.is_set():
            later.append(llm.generate_async(STEM, ENDLESS))
            later[0].abort()

    with held_steps(llm) as held:
        first = llm.generate_async(STEM, ENDLESS)
        first.subscribe(begin_another)
        first.abort()
    assert first.result(60).outputs[0].finish_reason == "cancelled"
    assert later[0].result(60).outputs[0].finish_reason == "cancelled"


def test_abort_before_the_start_and_behind_the_end(open_llm):
    llm = open_llm()
    with held_steps(llm):
        first = llm.generate_async(STEM, SamplingParams(max_tokens=3))
        handles = [llm.generate_async(STEM, ENDLESS) for _ in range(8)]
        for handle in handles:
            handle.abort()
            handle.abort()
    assert {h.result(60).outputs[0].finish_reason for h in handles} == {"cancelled"}
    done = first.result(60)
    first.abort()
    assert first.result() is done
    assert done.outputs[0].finish_reason in ("length", "stop")
    assert llm.generate(STEM, SamplingParams(max_tokens=3)).outputs == done.outputs


def test_iterating_again_goes_on(open_llm):
    llm = open_llm()
    params = SamplingParams(max_tokens=8, ignore_eos=True)
    handle = llm.generate_async(STEM, params, streaming=True)
    first = next(iter(handle))
    rest = list(handle)
    assert first.outputs[0].text_diff + "".join(o.outputs[0].text_diff for o in rest) == rest[-1].outputs[0].text
    assert list(handle) == []
    assert handle.result() is rest[-1]
    assert asyncio.run(again(handle)) == ([], rest[-1])


async def again(handle):
    return [o async for o in handle], await handle.aresult()


def test_several_may_wait_for_one_result(open_llm):
    llm = open_llm()
    params = SamplingParams(max_tokens=15, ignore_eos=True)

    async def wait():
        handle = llm.generate_async(STEM, params, streaming=True)
        return await asyncio.wait_for(asyncio.gather(handle.aresult(), handle.aresult(), handle.aresult()), 60)

    a, b, c = asyncio.run(wait())
    assert a is b is c
    handle, results = llm.generate_async(STEM, params, streaming=True), []
    threads = [threading.Thread(target=lambda: results.append(handle.result())) for _ in range(4)]
    for t in threads:
        t.start()
    for t in threads:
        t.join(60)
    assert len(results) == 4
    assert all(r is results[0] for r in results)


def test_a_loop_that_is_gone_does_not_stop_the_engine(open_llm):
    llm = open_llm()
    loop = asyncio.new_event_loop()
    handle = llm.generate_async(STEM, SamplingParams(max_tokens=40, ignore_eos=True), streaming=True)
    iterator = handle.__aiter__()
    loop.run_until_complete(anext(iterator))
    loop.close()
    assert len(llm.generate(STEM, SamplingParams(max_tokens=50, ignore_eos=True)).outputs[0].token_ids) == 50
    assert handle.result(60).outputs[0].finish_reason == "length"


def test_a_result_may_be_waited_for_with_a_limit(open_llm):
    llm = open_llm()
    with held_steps(llm):
        handle = llm.generate_async(STEM, ENDLESS)
        with pytest.raises(TimeoutError, match=r"0\.05 s"):
            handle.result(timeout=0.05)
        handle.abort()
    assert handle.result(60).outputs[0].finish_reason == "cancelled"


def test_requests_from_many_threads(open_llm):
    llm = open_llm()
    params = SamplingParams(max_tokens=10, ignore_eos=True)
    expected = [llm.generate(f"x{i} = ", params).outputs[0].text for i in range(8)]
    texts = {}

    def work(i):
        texts[i] = [llm.generate(f"x{i} = ", params).outputs[0].text for _ in range(3)]

    threads = [threading.Thread(target=work, args=(i,)) for i in range(8)]
    for t in threads:
        t.start()
    for t in threads:
        t.join()
    assert texts == {i: [expected[i]] * 3 for i in range(8)}


# -- who does not wait any more, and who may not wait


def nothing_runs(llm):
    stats = llm.stats()
    return (stats.num_running, stats.num_waiting, stats.used_blocks) == (0, 0, 0)


def assert_nothing_runs(llm):
    for _ in range(1200):
        if nothing_runs(llm):
            return
        time.sleep(0.05)
    raise AssertionError("a request that nobody waits for goes on")


def test_a_dropped_handle_ends_its_request(open_llm):
    llm = open_llm()
    for streaming in (False, True):
        with held_steps(llm, first=20):
            handles = [llm.generate_async(STEM, ENDLESS, streaming) for _ in range(3)]
            first = next(iter(handles[0])) if streaming else None
            assert not nothing_runs(llm)
            del handles
        assert_nothing_runs(llm)
    assert not first.finished
    assert llm.stats().generated_tokens_total < ENDLESS.max_tokens


def test_an_exception_in_the_midst_of_reading_ends_the_request(open_llm):
    llm = open_llm()

    def read():
        for _ in llm.generate_async(STEM, ENDLESS, streaming=True):
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        read()
    assert_nothing_runs(llm)


@pytest.mark.parametrize(("owner", "name"), [(EngineCore, "submit"), (GenerationResult, "result")])
def test_ctrl_c_ends_all_requests_of_generate(open_llm, monkeypatch, owner, name):
    """Though a notebook keeps the traceback, and with it all that its frames hold."""
    llm, original, calls = open_llm(), getattr(owner, name), []

    def interrupted(*args):
        calls.append(args)
        if len(calls) == 4 or name == "result":
            raise KeyboardInterrupt
        return original(*args)

    monkeypatch.setattr(owner, name, interrupted)
    with pytest.raises(KeyboardInterrupt) as kept:
        llm.generate([STEM] * 2, replace(ENDLESS, n=2))
    assert_nothing_runs(llm)
    assert kept.tb is not None
    assert llm.stats().generated_tokens_total < ENDLESS.max_tokens


@pytest.mark.parametrize("streaming", [False, True])
def test_a_cancelled_reader_ends_its_request(open_llm, streaming):
    """By ``wait_for`` as by ``cancel``; the handle is held all the while."""
    llm = open_llm()

    async def read():
        handles = [llm.generate_async(STEM, ENDLESS, streaming) for _ in range(2)]
        with pytest.raises(asyncio.TimeoutError):
            await asyncio.wait_for(handles[0].aresult(), 0.05)
        task = asyncio.ensure_future(handles[1].aresult())
        await asyncio.sleep(0)  # until it waits
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        return handles

    with held_steps(llm, first=20):
        handles = asyncio.run(read())
    assert_nothing_runs(llm)
    assert {h.result(60).outputs[0].finish_reason for h in handles} == {"cancelled"}


def test_a_reader_that_is_cancelled_leaves_the_others_theirs(open_llm):
    llm = open_llm()
    params = SamplingParams(max_tokens=200, ignore_eos=True)

    async def read():
        with llm._core._changed:  # nothing begins before the reader has given up
            handle = llm.generate_async(STEM, params)
            others = asyncio.ensure_future(handle.aresult())
            with pytest.raises(asyncio.TimeoutError):
                await asyncio.wait_for(handle.aresult(), 0.05)
        return await others

    assert asyncio.run(read()).outputs[0].finish_reason == "length"


def test_more_than_may_wait_are_rejected(open_llm):
    llm = open_llm(max_queue_size=3)
    params = SamplingParams(max_tokens=5, ignore_eos=True)
    with held_steps(llm) as held:
        running = llm.generate_async(STEM, params)
        assert held.begun.wait(60)  # now it waits no more, and nobody else begins
        waiting = [llm.generate_async(STEM, params) for _ in range(3)]
        with pytest.raises(QueueFullError, match="3 requests wait already, and max_queue_size is 3"):
            llm.generate_async(STEM, params)
        assert llm.stats().num_waiting == 3
        whole = []
        patient = threading.Thread(target=lambda: whole.extend(llm.generate([STEM] * 9, params)))
        patient.start()
        time.sleep(0.1)
        assert llm.stats().num_waiting == 3
    patient.join()
    results = [h.result(60) for h in (running, *waiting)] + whole
    assert len(results) == 13
    assert len({r.outputs[0].text for r in results}) == 1


@pytest.mark.parametrize("size", [-1, 1.5, "many", None])
def test_a_queue_of_no_size_is_rejected(engine, size):
    with pytest.raises(ConfigError, match="max_queue_size is"):
        LLM(engine("saw_int4"), max_queue_size=size)


def test_who_waits_for_room_is_told_of_the_end(open_llm):
    llm = open_llm(max_queue_size=1, kv_cache_config=KvCacheConfig(max_tokens=2048))
    errors = []

    def generate():
        try:
            # More than run at once: however late the end comes, some wait for room.
            llm.generate([[5] * 100] * 100, SamplingParams(max_tokens=1900, ignore_eos=True))
        except ShutdownError as e:
            errors.append(e)

    thread = threading.Thread(target=generate)
    thread.start()
    while llm.stats().num_waiting == 0:
        time.sleep(0.01)
    llm.shutdown()
    thread.join(60)
    assert len(errors) == 1


def test_a_forked_child_is_told_that_it_has_no_engine(engine):
    """It would wait for ever: no thread of the parent's is there. Nor may its end harm the parent."""
    code = """
import multiprocessing, sys, threading
from saw_trtllm import LLM, SamplingParams
from saw_trtllm.errors import EngineError

def child(say):
    for ask in (lambda: llm.generate([5]), lambda: llm.generate_async([5]), lambda: handle.result()):
        try:
            ask()
        except EngineError as e:
            say.send(str(e))
    llm.shutdown()

llm = LLM(sys.argv[1])
handle = llm.generate_async([5], SamplingParams(max_tokens=30, ignore_eos=True))
hear, say = multiprocessing.Pipe()
held, release = threading.Event(), threading.Event()

def hold():  # as any thread may at that moment
    with llm._core._changed:
        held.set()
        release.wait()

threading.Thread(target=hold).start()
held.wait()
process = multiprocessing.get_context("fork").Process(target=child, args=(say,))
process.start()
release.set()
process.join(60)
print(process.exitcode)
print(*[hear.recv() for _ in range(3)], sep=chr(10))
print(handle.result(60).outputs[0].finish_reason)
"""
    command = [sys.executable, "-W", "ignore", "-c", code, str(engine("saw_int4"))]
    forked = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert forked.stderr == ""
    status, *said, reason = forked.stdout.splitlines()
    assert (status, reason) == ("0", "length")
    assert len(said) == 3
    assert all("is a fork of it: make the LLM in the process that uses it" in s for s in said)


# -- failure and end


class BrokenDetokenizer(Detokenizer):
    """One that fails at the third token, or when it is asked for the rest."""

    def __init__(self, broken):
        super().__init__(None)
        self.left = 3
        self.broken = broken

    def push(self, *args):
        self.left -= 1
        if self.broken == "push" and not self.left:
            raise ValueError("no such character")
        return super().push(*args)

    def flush(self):
        if self.broken == "flush":
            raise ValueError("no such character")
        return super().flush()


@pytest.mark.parametrize("broken", ["push", "flush"])
def test_a_text_that_cannot_be_made_ends_its_request_alone(open_llm, broken, caplog):
    llm = open_llm()
    params = SamplingParams(max_tokens=8, ignore_eos=True)
    expected = llm.generate(STEM, params).outputs
    bad = [llm._inputs.requests([5, 6], ENDLESS, streaming) for streaming in (False, True)]
    for [request] in bad:
        request._detokenizer = BrokenDetokenizer(broken)
    with caplog.at_level(logging.CRITICAL):
        good = [llm.generate_async(STEM, params) for _ in range(3)]
        failing = [llm._submit(request) for request in bad]
        for result in failing:
            result.abort() if broken == "flush" else None
            with pytest.raises(EngineError, match="while it made this request's text: no such character"):
                result.result(60)
    assert [h.result(60).outputs for h in good] == [expected] * 3
    assert_nothing_runs(llm)
    assert llm.generate(STEM, params).outputs == expected


def fail_on(llm, token):
    """Let steps that hold ``token`` fail."""
    execute = llm._core._executor.execute

    def failing(step, *rest):
        if token in step.input_ids:
            raise RuntimeError("a bit fell over")
        return execute(step, *rest)

    llm._core._executor.execute = failing


def test_a_failing_step_ends_its_requests_alone(tmp_path, caplog):
    params = SamplingParams(max_tokens=4, ignore_eos=True)
    with LLM(build_example(tmp_path / "one", max_batch_size=1)) as llm, caplog.at_level(logging.CRITICAL):
        good = llm.generate([5, 6, 7], params).outputs[0].token_ids
        assert 1000 not in good
        fail_on(llm, 1000)
        handles = [llm.generate_async(p, params) for p in ([5, 6, 7], [5, 1000], [5, 6, 7])]
        assert handles[0].result(60).outputs[0].token_ids == good
        assert handles[2].result(60).outputs[0].token_ids == good
        for _ in range(2):
            with pytest.raises(EngineError, match="a bit fell over"):
                handles[1].result(60)
        with pytest.raises(EngineError):
            asyncio.run(llm_aresult(llm, [1000], params))
        assert list(handles[1]) == []
        handles[1].abort()
        assert llm.stats().used_blocks == 0
        assert llm.generate([5, 6, 7], params).outputs[0].token_ids == good


def test_a_broken_scheduler_leaves_nobody_waiting(open_llm, monkeypatch):
    llm = open_llm()
    handle = llm.generate_async(STEM, ENDLESS, streaming=True)
    next(iter(handle))

    def broken():
        raise RuntimeError("a bug")

    monkeypatch.setattr(llm._scheduler, "schedule", broken)
    with pytest.raises(EngineError, match="a bug"):
        handle.result(60)
    with pytest.raises((ShutdownError, EngineError)):
        llm.generate_async(STEM).result(60)


def test_shutdown_cancels_what_runs(open_llm):
    llm = open_llm()
    handles = [llm.generate_async(STEM, ENDLESS, streaming=bool(i % 2)) for i in range(6)]
    next(iter(handles[1]))
    llm.shutdown()
    assert {h.result(60).outputs[0].finish_reason for h in handles} == {"cancelled"}
    with pytest.raises(ShutdownError, match="shut down"):
        llm.generate(STEM)
    with pytest.raises(ShutdownError):
        llm.generate_async(STEM)
    handles[0].abort()
    llm.shutdown()
    assert llm.stats().used_blocks == 0


@pytest.mark.parametrize("holds_result", [True, False])
def test_an_llm_that_nobody_holds_is_shut_down(engine, holds_result):
    llm = LLM(engine("saw_int4"))
    thread = llm._core._thread
    handle = llm.generate_async(STEM, SamplingParams(max_tokens=5, ignore_eos=True))
    if holds_result:
        del llm
        gc.collect()
        assert handle.result(60).outputs[0].finish_reason == "length"
    else:
        del llm  # the engine's own thread is the last that lets go of it
    del handle
    for _ in range(600):
        gc.collect()
        if not thread.is_alive():
            break
        time.sleep(0.1)
    assert not thread.is_alive()


def test_a_program_may_end_while_requests_run(engine):
    code = (
        "import sys; from saw_trtllm import LLM, SamplingParams; llm = LLM(sys.argv[1]);"
        "h = llm.generate_async([5], SamplingParams(max_tokens=2000, ignore_eos=True), streaming=True); next(iter(h))"
    )
    ended = subprocess.run([sys.executable, "-c", code, str(engine("saw_int4"))], capture_output=True, timeout=120)
    assert (ended.returncode, ended.stderr) == (0, b"")


# -- stats


def test_stats_count(open_llm):
    llm = open_llm(kv_cache_config=KvCacheConfig(max_tokens=3200, deterministic=True), prefill_chunk=32)
    fresh = llm.stats()
    assert (fresh.max_blocks, fresh.free_blocks, fresh.tokens_per_block) == (100, 100, 32)
    assert (fresh.requests_total, fresh.prompt_tokens_total, fresh.generated_tokens_total) == (0, 0, 0)
    params = SamplingParams(max_tokens=6, ignore_eos=True)
    ids = llm.tokenizer.encode(STEM * 4)[:100]
    llm.generate(ids, params)
    llm.generate([ids, ids[:50]], params)
    stats = llm.stats()
    assert stats.requests_total == 3
    assert stats.prompt_tokens_total == 250
    assert stats.generated_tokens_total == 18
    assert stats.reused_tokens_total == 96 + 32
    assert stats.ttft_count == 3
    assert 0 < stats.ttft_seconds_sum < 60
    assert (stats.used_blocks, stats.free_blocks, stats.num_running, stats.num_waiting) == (0, 100, 0, 0)
    handle = llm.generate_async(ids, ENDLESS, streaming=True)
    next(iter(handle))
    running = llm.stats()
    assert (running.num_running, running.requests_total) == (1, 4)
    assert running.used_blocks >= 4
    handle.abort()


# -- rejected


@pytest.mark.parametrize(
    ("prompt", "params", "said"),
    [
        ("", {}, "the prompt is empty"),
        ([], {}, "the prompt is empty"),
        ("a\ud800b", {}, "not valid UTF-8"),
        ("word " * 10**6, {}, "5000000 bytes, too many for the 2047 tokens"),
        ([5] * 2048, {}, "2048 tokens and the engine takes 2047"),
        ([5] * 2000, {"max_tokens": 49}, "ask for at most 48"),
        ([5, 1024], {}, "token 1024: ids go from 0 to 1023"),
        ([5, -1], {}, "token -1"),
        ([1.5], {}, "list of token ids"),
        (7, {}, "the prompt is 7: give text, a list of token ids"),
        (None, {}, "the prompt is None: give text"),
        (b"text", {}, "list of token ids"),
        ([10**5000], {}, "token a number of 16610 bits"),
        ({}, {}, "the prompt's dict is empty: give text"),
        ({"text": "x"}, {}, "the prompt's dict has 'text': give text"),
        ({"prompt": [5, 6]}, {}, "the prompt is .5, 6.: give text, or token ids as prompt_token_ids"),
        ({"prompt_token_ids": "abc"}, {}, "the prompt is 'abc'"),
        ({"prompt": "x", "multi_modal_data": {}}, {}, "has 'multi_modal_data'"),
        ({"prompt": "x", "cache_salt": 7}, {}, "cache_salt is 7: give text of at most 256 whole characters"),
        ([5], {"min_tokens": 1, "stop_token_ids": range(1024)}, "every token ends the text"),
    ],
)
def test_requests_that_do_not_fit_are_rejected_at_once(open_llm, prompt, params, said):
    llm = open_llm()
    with pytest.raises(RequestError, match=said):
        llm.generate_async(prompt, SamplingParams(**params))
    assert llm.stats().requests_total == 0


def test_prompts_of_other_apis_are_taken(open_llm):
    llm, params = open_llm(), SamplingParams(max_tokens=4, ignore_eos=True)
    ids = llm.tokenizer.encode(STEM)
    expected = llm.generate(STEM, params)
    assert llm.generate({"prompt": STEM, "multi_modal_data": None}, params).outputs == expected.outputs
    several = [{"prompt": STEM}, {"prompt_token_ids": ids}, {"prompt": "told", "prompt_token_ids": np.array(ids)}, ids]
    outputs = llm.generate(several, params)
    assert [o.prompt for o in outputs] == [STEM, None, "told", None]
    assert all(o.outputs == expected.outputs for o in outputs)
    assert llm.generate((i for i in ids), params).outputs == expected.outputs
    assert llm.generate(torch.tensor(ids), params).outputs == expected.outputs
    assert llm.generate(torch.tensor([ids]), params)[0].outputs == expected.outputs

    async def awaited():
        return await llm.generate_async(STEM, params)

    assert asyncio.run(awaited()).outputs == expected.outputs
    assert llm.generate_async({"prompt": STEM}, params).result(60).outputs == expected.outputs


def test_arguments_of_other_apis_are_rejected_in_one_sentence(open_llm, engine, tmp_path):
    llm = open_llm()
    for inputs in (None, 5, b"text"):
        with pytest.raises(RequestError, match=r"inputs is .*: give text, a list of token ids"):
            llm.generate(inputs)
    for params in ({"max_tokens": 3}, "greedy"):
        with pytest.raises(RequestError, match=r"sampling_params is .*: give SamplingParams"):
            llm.generate_async([5], params)
    for options, said in (
        ({"kv_cache_config": {"max_tokens": 0}}, "max_tokens is 0"),
        ({"kv_cache_config": {"max_token": 64}}, "KvCacheConfig has no max_token: write max_tokens"),
        ({"kv_cache_config": 0.5}, "kv_cache_config is 0.5: give a KvCacheConfig, or its fields as a dict"),
        ({"tokenizer": open_llm().tokenizer._tokenizer}, "tokenizer is .*: give the folder of a tokenizer.json"),
        ({"tensor_parallel_size": 2}, "LLM has no tensor_parallel_size"),
        ({"max_model_len": 2}, "LLM has no max_model_len: build the engine with saw-build --max_seq_len"),
    ):
        with pytest.raises(ConfigError, match=said):
            LLM(engine("saw_int4"), **options)
    for model in (None, 5):
        with pytest.raises(EngineError, match=r"model is .*: give the --output_dir of saw-build"):
            LLM(model)
    with pytest.raises(
        EngineError, match="holds a Hugging Face model, not an engine: build one with saw-build --model"
    ):
        LLM(EXAMPLE)
    save_checkpoint(Checkpoint.open(EXAMPLE), tmp_path)
    with pytest.raises(
        EngineError, match=r"holds a checkpoint of TensorRT-LLM, .*: build one with saw-build --checkpoi"
    ):
        LLM(tmp_path)


def test_a_cache_may_be_given_as_a_dict(open_llm):
    assert open_llm(kv_cache_config={"max_tokens": 64}).stats().max_blocks == 2


def test_a_bad_request_among_others_starts_none(open_llm):
    llm = open_llm()
    with pytest.raises(RequestError):
        llm.generate([STEM, ""])
    with pytest.raises(RequestError, match="2 sampling parameters came with 3 prompts"):
        llm.generate([STEM] * 3, [SamplingParams()] * 2)
    assert llm.stats().requests_total == 0


def test_a_request_that_the_cache_cannot_hold_is_rejected(open_llm):
    llm = open_llm(kv_cache_config=KvCacheConfig(max_tokens=64))
    with pytest.raises(RequestError, match="65 tokens, 3 blocks, and the KV cache has 2"):
        llm.generate([5] * 60, SamplingParams(max_tokens=5))
    assert len(llm.generate([5] * 60, SamplingParams(max_tokens=4, ignore_eos=True)).outputs[0].token_ids) == 4


def test_an_engine_without_tokenizer_takes_ids_alone(tmp_path):
    folder = build_example(tmp_path / "engine")
    (folder / "tokenizer.json").unlink()
    with LLM(folder, verify=False) as llm:
        assert llm.tokenizer is None
        answer = llm.generate([5, 6], SamplingParams(max_tokens=4)).outputs[0]
        assert (len(answer.token_ids), answer.text) == (4, "")
        with pytest.raises(RequestError, match="no tokenizer"):
            llm.generate("text")
        with pytest.raises(RequestError, match="stop strings need a tokenizer"):
            llm.generate([5], SamplingParams(stop="x"))
    with LLM(folder, tokenizer=EXAMPLE) as llm:
        assert llm.generate("text", SamplingParams(max_tokens=4)).outputs[0].text != ""


def test_logits_need_an_engine_built_for_them(tmp_path):
    with LLM(build_example(tmp_path / "engine")) as llm:
        for name in ("context", "generation"):
            with pytest.raises(RequestError, match=f"--gather_{name}_logits"):
                llm.generate([5], SamplingParams(**{f"return_{name}_logits": True}))


@pytest.mark.parametrize(
    "fields",
    [
        {"max_tokens": 0},
        {"max_tokens": -32},
        {"max_tokens": "64"},
        {"enable_block_reuse": "no"},
        {"free_gpu_memory_fraction": float("nan")},
    ]
    + [{"free_gpu_memory_fraction": f} for f in (0, -1, 1.1)],
)
def test_bad_cache_sizes_are_rejected(fields):
    with pytest.raises(ConfigError, match="KV cache"):
        KvCacheConfig(**fields)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"kv_cache_config": KvCacheConfig(max_tokens=31)}, "31 tokens and a block has 32"),
        ({"kv_cache_config": KvCacheConfig(max_tokens=10**15)}, "does not fit into this machine's memory"),
        ({"prefill_chunk": 33}, "multiple of tokens_per_block 32"),
        ({"prefill_chunk": 0}, "prefill_chunk is 0"),
        ({"prefill_chunk": "512"}, "prefill_chunk is '512'"),
        ({"prefill_chunk": 512.0}, "prefill_chunk is 512.0"),
        ({"prefill_chunk": 8192}, "prefill_chunk is 8192"),
    ],
)
def test_bad_engine_options_are_rejected(engine, options, said):
    with pytest.raises(EngineError, match=said):
        LLM(engine("saw_int4"), **options)


# -- several texts, and choices that look at more than logits


def test_n_texts_share_the_prompts_chunks_and_are_those_of_n_requests(open_llm):
    llm = open_llm(prefill_chunk=64, kv_cache_config=KvCacheConfig(2048, deterministic=True))
    prompt = Tokenizer.load(EXAMPLE).encode(STEM * 8)[:200]
    params = SamplingParams(max_tokens=12, temperature=1.0, seed=7, n=3, logprobs=True)
    output = llm.generate(prompt, params)
    assert [o.index for o in output.outputs] == [0, 1, 2]
    alone = [llm.generate(prompt, replace(params, n=1, seed=7 + i)).outputs[0] for i in range(3)]
    assert [(o.text, o.token_ids) for o in output.outputs] == [(o.text, o.token_ids) for o in alone]
    # Each of the two others finds the 192 tokens that are whole chunks.
    llm = open_llm(prefill_chunk=64, kv_cache_config=KvCacheConfig(2048, deterministic=True))
    llm.generate(prompt, params)
    assert llm.stats().reused_tokens_total == 2 * 192


def test_n_texts_stream_side_by_side(open_llm):
    llm = open_llm(kv_cache_config=KvCacheConfig(2048))
    params = SamplingParams(max_tokens=6, temperature=1.0, n=2, ignore_eos=True)
    result = llm.generate_async("def", params, streaming=True)
    texts, finished = ["", ""], []
    for piece in result:
        [output] = piece.outputs
        texts[output.index] += output.text_diff
        finished.append(piece.finished)
    whole = result.result()
    assert [o.text for o in whole.outputs] == texts
    assert finished == [False] * (len(finished) - 1) + [True]


def test_n_texts_are_queued_all_or_none(open_llm):
    llm = open_llm(max_queue_size=1, kv_cache_config=KvCacheConfig(2048))
    with llm._core._changed, pytest.raises(QueueFullError):  # none of them begins before the last is queued
        llm.generate_async("def", SamplingParams(max_tokens=500, n=64, ignore_eos=True))
    while (stats := llm.stats()).num_running + stats.num_waiting:
        time.sleep(0.01)


def test_bad_words_do_not_come(open_llm):
    llm = open_llm(kv_cache_config=KvCacheConfig(2048))
    params = SamplingParams(max_tokens=24, ignore_eos=True)
    free = llm.generate(STEM, params).outputs[0]
    assert "self" in free.text
    held = llm.generate(STEM, replace(params, bad=["self"])).outputs[0]
    assert "self" not in held.text
    held = llm.generate(STEM, replace(params, bad_token_ids=free.token_ids[:1])).outputs[0]
    assert free.token_ids[0] not in held.token_ids
    with pytest.raises(RequestError, match="names token 1024: ids go from 0 to 1023"):
        llm.generate(STEM, replace(params, logit_bias={1024: 1}))


def test_top_logprobs_hold_the_tokens_own(open_llm):
    llm = open_llm(kv_cache_config=KvCacheConfig(2048))
    params = SamplingParams(max_tokens=5, logprobs=True, top_logprobs=3, ignore_eos=True)
    output = llm.generate(STEM, params).outputs[0]
    firsts = [places[0] for places in output.top_logprobs]
    assert firsts == list(zip(output.token_ids, output.logprobs, strict=True))
    assert {len(places) for places in output.top_logprobs} == {3}
