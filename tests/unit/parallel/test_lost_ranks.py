"""What the runtime does when its executor loses a rank, and with it all that it held."""

import random

import httpx
import numpy as np
import pytest

from saw_trtllm import LLM, SamplingParams
from saw_trtllm import llm as llm_module
from saw_trtllm.errors import ConfigError, RankError
from tests.support.example import build_example
from tests.support.executor.remembering import RememberingExecutor, expected_text
from tests.support.openai_server import serving_engines, wait_until_idle


class LosingExecutor(RememberingExecutor):
    """Loses a rank in so many of its calls, or in those of some numbers, and then holds nothing."""

    def __init__(self, *arguments):
        super().__init__(*arguments)
        self.chance, self.random, self.num_losses = 0.0, random.Random(0), 0
        self.num_calls, self.loses_in = 0, ()

    def _lose(self):
        self.num_calls += 1
        if self.num_calls in self.loses_in or self.random.random() < self.chance:
            self._rows[:] = self._host[:] = -1
            self.num_losses += 1
            raise RankError("rank 1 was lost")

    def launch(self, *step):
        self._lose()
        return Losing(self, super().launch(*step))

    def transfer(self, *copies):
        self._lose()
        super().transfer(*copies)
        return Losing(self, None)


class Losing:
    """A step or a transfer under way."""

    def __init__(self, executor, step):
        self._executor, self._step, self._made = executor, step, False

    def draw(self, sampling):
        self._executor._lose()
        self._step.draw(sampling)

    def result(self):
        self._executor._lose()
        return self._step.result()

    def done(self):
        self._made = self._made or self._executor.random.random() < 0.3
        return self._made

    def wait(self):
        self._executor._lose()
        self._made = True


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return build_example(tmp_path_factory.mktemp("one"), kv="fp16", max_batch_size=8, max_num_tokens=256)


@pytest.fixture
def open_llm(folder, monkeypatch):
    opened = []

    def open_(**options):
        monkeypatch.setattr(llm_module, "open_executor", lambda *arguments: LosingExecutor(*arguments[:3]))
        opened.append(LLM(folder, **options))
        return opened[-1]

    yield open_
    for llm in opened:
        llm.executor.chance = 0.0
        llm.shutdown()


def requests(count, max_tokens=40):
    rng = np.random.default_rng(3)
    stem = rng.integers(8, 1000, 150).tolist()
    prompts = [stem[: rng.integers(0, 150)] + rng.integers(8, 1000, 5).tolist() for _ in range(count)]
    # The executor knows no penalties: a text with one is drawn later, and the same.
    late = [{"presence_penalty": 1.0} if i % 5 == 0 else {} for i in range(count)]
    params = [SamplingParams(max_tokens=max_tokens, ignore_eos=True, seed=i, **late[i]) for i in range(count)]
    return prompts, params, [expected_text(p, s.seed, max_tokens, 1024) for p, s in zip(prompts, params, strict=True)]


def settled(llm):
    """Wait for the last step, which nobody waits for, and check every block."""
    wait_until_idle(llm)
    llm._scheduler.blocks.check()


@pytest.mark.parametrize(("deterministic", "chance"), [(False, 0.05), (True, 0.005)])
def test_with_retries_every_text_is_as_without_losses(open_llm, deterministic, chance):
    # Room for a few requests only, so that some are preempted and blocks come and go to the host.
    cache = {"max_tokens": 1024, "host_cache_size": 20, "deterministic": deterministic}
    llm = open_llm(kv_cache_config=cache, retry=10_000)
    prompts, params, expected = requests(30)
    llm.executor.chance, llm.executor.loses_in = chance, (50,)  # one at least, whatever comes by chance
    assert [output.outputs[0].token_ids for output in llm.generate(prompts, params)] == expected
    assert llm.executor.num_losses > 0
    llm.executor.chance = 0.0
    settled(llm)
    assert [output.outputs[0].token_ids for output in llm.generate(prompts, params)] == expected
    assert llm.stats().restarts_total == llm.executor.num_losses  # copies go on behind the last text, and may be lost


def test_without_retries_only_what_had_begun_fails_and_in_one_sentence(open_llm):
    llm = open_llm(kv_cache_config={"max_tokens": 1024, "host_cache_size": 20})
    prompts, params, expected = requests(30)
    llm.executor.loses_in = (40, 120)
    answered = 0
    handles = [llm.generate_async(p, s) for p, s in zip(prompts, params, strict=True)]
    said = []
    for handle, text in zip(handles, expected, strict=True):
        try:
            answered += handle.result().outputs[0].token_ids == text
        except RankError as e:
            said.append(str(e))
    assert set(said) == {"rank 1 was lost while it computed this request: send it again, or start with retry=1"}
    assert answered > 0
    assert answered + len(said) == 30
    settled(llm)


def test_a_stream_goes_on_where_it_was(open_llm):
    llm = open_llm(retry=2)
    llm.executor.loses_in = (15, 30)
    (prompt,), (params,), (expected,) = requests(1)
    pieces = list(llm.generate_async(prompt, params, streaming=True))
    assert [token for piece in pieces for token in piece.outputs[0].token_ids_diff] == expected
    assert llm.executor.num_losses == 2


def test_a_client_is_told_with_the_code_that_says_so(folder, monkeypatch):
    monkeypatch.setattr(llm_module, "open_executor", lambda *arguments: LosingExecutor(*arguments[:3]))
    with serving_engines({"example": folder}) as (url, [model]):
        model.llm.executor.loses_in = (5,)
        asked = {"prompt": "x", "max_tokens": 20, "ignore_eos": True}
        answer = httpx.post(f"{url}/v1/completions", json=asked, timeout=60)
    error = answer.json()["error"]
    assert (answer.status_code, error["type"], error["code"]) == (503, "server_error", "rank_lost")
    assert error["message"].startswith("rank 1 was lost while it computed this request: send it again")


@pytest.mark.parametrize("retry", [-1, 1.5, "2", None])
def test_a_retry_that_is_no_number_is_rejected(folder, retry):
    with pytest.raises(ConfigError, match=r"retry is .*: it must be a whole number"):
        LLM(folder, retry=retry)
