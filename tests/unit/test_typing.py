"""A user's type checker sees the interface as it is used."""

import subprocess
import sys

from tests.support import ROOT

SCRIPT = """
import asyncio
from pathlib import Path

from saw_trtllm import LLM, CompletionOutput, GuidedDecodingParams, KvCacheConfig, RequestOutput, SamplingParams
from saw_trtllm.errors import SawError


def texts(llm: LLM) -> list[str]:
    params = SamplingParams(max_tokens=64, guided_decoding=GuidedDecodingParams(json={"type": "object"}))
    alone = [llm.generate("def main():", params), llm.generate([1, 2, 3]), llm.generate({"prompt": "x"})]
    several: list[RequestOutput] = llm.generate(["def main():", "class Queue:"], [params, params])
    several += llm.generate([[1, 2, 3], [4]]) + llm.generate([{"prompt": "x"}, "y", [5]])
    messages = [{"role": "user", "content": "hi"}]
    alone.append(llm.chat(messages, params, add_generation_prompt=False))
    several += llm.chat([messages, messages])
    return [output.outputs[0].text for output in alone + several]


async def stream(llm: LLM) -> str:
    async for piece in llm.generate_async("x", streaming=True):
        completion: CompletionOutput = piece.outputs[0]
        print(completion.text_diff)
    result = await llm.generate_async("x")
    return result.outputs[0].text


try:
    with LLM(Path("engine"), kv_cache_config=KvCacheConfig(deterministic=True)) as llm:
        print(texts(llm), asyncio.run(stream(llm)), llm.stats().num_running)
except SawError as error:
    print(error)
"""


def test_a_users_script_is_typed(tmp_path):
    (tmp_path / "script.py").write_text(SCRIPT)
    files = [tmp_path / "script.py", ROOT / "examples" / "generate.py"]
    command = [sys.executable, "-m", "mypy", "--strict", "--config-file=", f"--cache-dir={tmp_path}", *files]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False, timeout=280)
    assert (done.returncode, done.stdout) == (0, "Success: no issues found in 2 source files\n"), done.stdout
