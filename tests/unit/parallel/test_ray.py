"""Ranks, and replicas of a server, on a Ray of this machine."""

import asyncio
import logging
import os
import signal
from contextlib import suppress

import httpx
import psutil
import pytest

from saw_trtllm import LLM, SamplingParams
from tests.support.example import build_example

ray = pytest.importorskip("ray", reason="Ray is not installed")


@pytest.fixture(scope="module", autouse=True)
def one_ray():
    """All tests share what the first one starts."""
    yield
    ray.shutdown()


def test_ranks_of_ray_give_the_texts_of_processes_also_when_one_is_killed(tmp_path):
    """The same sums in the same order, so the same tokens, drawn ones too, which another rounding may change."""
    prompts = ["import os\nimport sys\n", "def f(x):\n", "class Node:\n    def"]
    params = [SamplingParams(max_tokens=24), SamplingParams(max_tokens=24, temperature=1.0, seed=3)]
    params.append(SamplingParams(max_tokens=24, repetition_penalty=1.2, ignore_eos=True))
    folder = build_example(tmp_path / "engine", kv="fp16", tp_size=2, max_num_tokens=512, max_batch_size=8)
    with LLM(folder, parallel_config={"ranks": "processes"}) as llm:
        texts = [output.outputs[0].token_ids for output in llm.generate(prompts, params)]
    with LLM(folder, retry=1) as llm:
        assert [output.outputs[0].token_ids for output in llm.generate(prompts, params)] == texts
        pieces = iter(llm.generate_async(prompts[2], params[2], streaming=True))
        tokens = list(next(pieces).outputs[0].token_ids_diff)
        os.kill(llm.executor.pids[1], signal.SIGKILL)
        tokens += [token for piece in pieces for token in piece.outputs[0].token_ids_diff]
    assert tokens == texts[2]


def test_no_request_that_is_retried_is_lost_with_a_replica(tmp_path):
    pytest.importorskip("ray.serve", reason="Ray Serve is not installed")
    from saw_trtllm.serve.openai.model import ModelSpec
    from saw_trtllm.serve.openai.replicas import replicas

    folder = build_example(tmp_path / "engine", kv="fp16", max_num_tokens=512, max_batch_size=8)
    bodies = [{"prompt": f"x = {i}\n", "max_tokens": 30, "temperature": 0, "ignore_eos": True} for i in range(24)]

    paths = ("/v1/completions", "/v1/messages")

    async def post(client, body):
        return await client.post("/v1/completions", json=body)

    async def run(app):
        async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://saw", timeout=None) as client:
            calm = await asyncio.gather(*(post(client, body) for body in bodies))
            tasks = [asyncio.ensure_future(post(client, body)) for body in bodies]
            await asyncio.sleep(0.1)
            os.kill(_replicas()[0], signal.SIGKILL)
            large = await asyncio.gather(*(client.post(path, content=bytes(2 << 20)) for path in paths))
            return calm, await asyncio.gather(*tasks), large

    spec = ModelSpec("example", folder, None, None, {})
    with replicas([spec], 3, [], [], retry=9, route_by="load") as app:
        calm, stormy, large = asyncio.run(run(app))
    assert {answer.status_code for answer in [*calm, *stormy]} == {200}
    texts = [[answer.json()["choices"][0]["text"] for answer in answers] for answers in (calm, stormy)]
    assert texts[0] == texts[1]
    assert [answer.status_code for answer in large] == [413, 413]  # by the process that listens, in each API's words
    assert [answer.json()["error"]["type"] for answer in large] == ["invalid_request_error", "request_too_large"]


def test_prompts_of_one_beginning_go_where_it_was_computed(tmp_path):
    """By Serve's own router; by load alone, the second replica would get some of them with a chance of 1 - 2⁻⁹."""
    pytest.importorskip("ray.serve", reason="Ray Serve is not installed")
    from saw_trtllm.serve.openai.model import ModelSpec
    from saw_trtllm.serve.openai.replicas import replicas

    folder = build_example(tmp_path / "engine", kv="fp16", max_num_tokens=512, max_batch_size=8)
    stems = ["import os\nimport sys\n", "class Node:\n    def f(self):\n", "for i in range(8):\n"]
    handlers = logging.getLogger().handlers[:]

    async def run(app):
        async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://saw", timeout=None) as client:
            bodies = [{"prompt": 8 * stem + f"x = {i}\n", "max_tokens": 4} for i in range(4) for stem in stems]
            answers = [(await client.post("/v1/completions", json=body)).json() for body in bodies]
            return [answer["usage"].get("prompt_tokens_details", {}).get("cached_tokens", 0) for answer in answers]

    spec = ModelSpec("example", folder, None, None, {})
    with replicas([spec], 2, [], [], retry=0, route_by="prefix") as app:
        cached = asyncio.run(run(app))
    assert max(cached[:3]) <= 1  # the token that each text begins with
    assert all(count > 32 for count in cached[3:])
    assert logging.getLogger().handlers == handlers


def _replicas():
    pids = []
    for process in psutil.Process().children(recursive=True):
        with suppress(psutil.NoSuchProcess):  # Ray's own processes come and go
            if "ServeReplica" in process.name() + " ".join(process.cmdline()):
                pids.append(process.pid)
    return pids
