"""An engine in a process of its own: its greedy tokens for the prompts on stdin, as JSON, one after the other.

python -m tests.engines.fresh ENGINE MAX_TOKENS < prompts.json
"""

from __future__ import annotations

import json
import sys

from saw_trtllm import LLM, KvCacheConfig, SamplingParams

with LLM(sys.argv[1], kv_cache_config=KvCacheConfig(max_tokens=4096, deterministic=True)) as llm:
    params = SamplingParams(max_tokens=int(sys.argv[2]), ignore_eos=True)
    outputs = [llm.generate(prompt, params) for prompt in json.load(sys.stdin)]
    json.dump([output.outputs[0].token_ids for output in outputs], sys.stdout)
