"""Ranks as actors of a Ray of this machine."""

import os
import signal

import pytest

from saw_trtllm import LLM, SamplingParams
from tests.support.example import build_example

ray = pytest.importorskip("ray", reason="Ray is not installed")


def test_ranks_of_ray_give_the_texts_of_one_rank_also_when_one_is_killed(tmp_path):
    prompts = ["import os\nimport sys\n", "def f(x):\n", "class Node:\n    def"]
    params = [SamplingParams(max_tokens=24), SamplingParams(max_tokens=24, temperature=1.0, seed=3)]
    params.append(SamplingParams(max_tokens=24, repetition_penalty=1.2, ignore_eos=True))
    texts = {}
    for size in (1, 2):
        folder = build_example(tmp_path / str(size), kv="fp16", tp_size=size, max_num_tokens=512, max_batch_size=8)
        with LLM(folder, retry=1) as llm:
            texts[size] = [output.outputs[0].token_ids for output in llm.generate(prompts, params)]
            if size == 2:
                pieces = iter(llm.generate_async(prompts[2], params[2], streaming=True))
                tokens = list(next(pieces).outputs[0].token_ids_diff)
                os.kill(llm.executor.pids[1], signal.SIGKILL)
                tokens += [token for piece in pieces for token in piece.outputs[0].token_ids_diff]
    ray.shutdown()
    assert texts[2] == texts[1]
    assert tokens == texts[1][2]
