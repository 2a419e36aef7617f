"""A rank that is killed, stopped or slowed: no request and no block is lost, and the group comes back."""

import itertools
import os
import signal
import threading
import time

import numpy as np
import pytest

from benchmarks.serving.rank_faults import run_with_faults
from saw_trtllm import LLM, SamplingParams
from saw_trtllm.parallel import open as opening
from saw_trtllm.parallel.processes import LocalProcesses
from tests.support.example import build_example
from tests.support.executor.remembering import RememberingProcesses, expected_text


@pytest.fixture(scope="module")
def tp2(tmp_path_factory):
    return build_example(tmp_path_factory.mktemp("tp2"), kv="fp16", tp_size=2, max_batch_size=16, max_num_tokens=512)


@pytest.fixture
def open_group(tp2, monkeypatch):
    monkeypatch.setitem(opening.LAUNCHERS, "processes", RememberingProcesses)
    opened = []

    def open_(step_timeout=60.0, **options):
        parallel = {"ranks": "processes", "step_timeout": step_timeout}
        opened.append(LLM(tp2, parallel_config=parallel, **options))
        return opened[-1]

    yield open_
    for llm in opened:
        llm.shutdown()


def requests(count, max_tokens, vocab=1024):
    rng = np.random.default_rng(5)
    stem = rng.integers(8, vocab, 200).tolist()
    prompts = [
        stem[: rng.integers(0, 200)] + rng.integers(8, vocab, rng.integers(1, 30)).tolist() for _ in range(count)
    ]
    # The executor knows no penalties: a text with one is drawn later, and the same.
    late = [{"presence_penalty": 1.0} if i % 5 == 0 else {} for i in range(count)]
    params = [SamplingParams(max_tokens=max_tokens, ignore_eos=True, seed=i, **late[i]) for i in range(count)]
    return prompts, params, [expected_text(p, s.seed, max_tokens, vocab) for p, s in zip(prompts, params, strict=True)]


@pytest.mark.parametrize(("faults", "retry"), [(["killed"], 0), (["slowed", "killed", "stopped"], 1000)])
def test_no_request_and_no_block_is_lost(open_group, faults, retry):
    # A pool that preempts, and a host cache: what is to be put in order after a loss.
    # Only a rank that is stopped is to be missed soon: without a retry, one that a busy machine holds up must not be.
    patience = 2.0 if "stopped" in faults else 60.0
    llm = open_group(patience, kv_cache_config={"max_tokens": 2048, "host_cache_size": 40}, retry=retry)
    prompts, params, expected = requests(40, 30)
    counts = run_with_faults(llm, prompts, params, expected, faults, pause=(0.0, 0.3))
    assert counts.other_texts == 0
    assert counts.lost_blocks == 0
    assert counts.answered + counts.failed >= 40
    assert counts.failed == 0 or retry == 0
    assert counts.restarts >= len(set(faults) - {"slowed"})
    llm._scheduler.blocks.check()
    answers = [output.outputs[0].token_ids for output in llm.generate(prompts, params)]
    assert answers == expected


def test_a_shutdown_does_not_wait_for_ranks_that_do_not_come_back(open_group, monkeypatch):
    """They start, and say nothing: the group would wait for them for half an hour."""
    llm = open_group(retry=9)
    (prompt,), (params,), _ = requests(1, 400)
    launch, killed, numbers = llm.executor.launch, threading.Event(), itertools.count()

    def held(*step):  # the text does not end before its rank is lost
        assert next(numbers) < 20 or killed.wait(60)
        return launch(*step)

    monkeypatch.setattr(llm.executor, "launch", held)
    pieces = iter(llm.generate_async(prompt, params, streaming=True))
    next(pieces)
    started = []

    def start(processes, specs):
        LocalProcesses.start(processes, specs)
        started.extend(processes._processes)

    monkeypatch.setattr(RememberingProcesses, "code", "import time; time.sleep(3600)")
    monkeypatch.setattr(RememberingProcesses, "start", start)
    os.kill(llm.executor.pids[1], signal.SIGKILL)
    killed.set()
    while not started:
        time.sleep(0.01)
    ending = threading.Thread(target=llm.shutdown, daemon=True)
    ending.start()
    ending.join(60)
    assert not ending.is_alive()
    assert all(process.poll() is not None for process in started)
    *_, last = pieces
    assert last.outputs[0].finish_reason == "cancelled"
