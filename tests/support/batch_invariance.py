"""Run as a program: texts of prompts one by one, and of all at once, with 1 and 2 threads, as JSON on stdout."""

import json
import sys

import numpy as np

from saw_trtllm import LLM, KvCacheConfig, SamplingParams
from saw_trtllm.backends.reference.executor import torch


def texts(folder, count, length, max_tokens):
    """Tokens of ``count`` greedy and as many sampled requests: one by one, and all in one batch."""
    rng = np.random.default_rng(7)
    prompts = [rng.integers(3, 1000, length + i).tolist() for i in range(count)] * 2
    params = [SamplingParams(max_tokens=max_tokens, ignore_eos=True)] * count
    params += [SamplingParams(max_tokens=max_tokens, ignore_eos=True, temperature=1.0, seed=i) for i in range(count)]
    with LLM(folder, kv_cache_config=KvCacheConfig(8192, enable_block_reuse=False)) as llm:
        single = [llm.generate(*request).outputs[0].token_ids for request in zip(prompts, params, strict=True)]
        batch = [output.outputs[0].token_ids for output in llm.generate(prompts, params)]
    return {"single": single, "batch": batch}


if __name__ == "__main__":
    found = []
    for num_threads in (1, 2):
        torch.set_num_threads(num_threads)
        found.append({"num_threads": torch.get_num_threads(), **texts(sys.argv[1], 8, 97, 6)})
    json.dump(found, sys.stdout)
