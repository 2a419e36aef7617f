"""Clients of other projects, as they come, against a real tritonserver: each is tried where it is installed.

pip install llama-index-llms-nvidia-triton litellm kserve
"""

import json
import os
import subprocess
import sys
from importlib.metadata import distributions
from pathlib import Path

import pytest

from saw_trtllm import LLM, KvCacheConfig, SamplingParams
from tests.support import ROOT
from tests.support.example import EXAMPLE, build_example
from tests.triton.test_server import PROMPT, running_server

pytestmark = [
    pytest.mark.triton,
    # What these packages do when they are imported is theirs.
    pytest.mark.filterwarnings("ignore"),
]
MAX_TOKENS = 12


def needs(package):
    installed = next(distributions(name=package), None) is not None
    return pytest.mark.skipif(not installed, reason=f"{package} is not installed")


@pytest.fixture(scope="module")
def engine_dir(tmp_path_factory):
    return build_example(tmp_path_factory.mktemp("engine"), max_seq_len=256)


@pytest.fixture(scope="module")
def texts(engine_dir):
    """By their number of tokens."""
    params = [SamplingParams(max_tokens=n) for n in range(1, MAX_TOKENS + 1)]
    with LLM(engine_dir, kv_cache_config=KvCacheConfig(deterministic=True)) as llm:
        outputs = llm.generate([PROMPT] * MAX_TOKENS, params)
    return {n: output.outputs[0].text for n, output in enumerate(outputs, 1)}


@pytest.fixture(scope="module")
def server(engine_dir, tmp_path_factory):
    with running_server(engine_dir, tmp_path_factory.mktemp("triton")) as server:
        yield server


@needs("llama-index-llms-nvidia-triton")
def test_llama_index(server, texts):
    from llama_index.llms.nvidia_triton import NvidiaTriton

    llm = NvidiaTriton(server_url=f"127.0.0.1:{server.grpc}", tokens=MAX_TOKENS, triton_load_model_call=False)
    # It takes one piece fewer than it asks tokens for.
    assert llm.complete(PROMPT).text == texts[MAX_TOKENS - 1]
    pieces = [piece.delta for piece in llm.stream_complete(PROMPT)]
    assert len(pieces) > 1
    assert "".join(pieces) == texts[MAX_TOKENS - 1]


@needs("litellm")
def test_litellm(server, texts):
    import litellm

    asked = {"messages": [{"role": "user", "content": PROMPT}], "max_tokens": MAX_TOKENS}
    asked["api_base"] = f"http://127.0.0.1:{server.http}/v2/models/ensemble/generate"
    answer = litellm.completion("triton/ensemble", **asked)
    assert answer.choices[0].message.content == PROMPT + texts[MAX_TOKENS]
    pieces = [c.choices[0].delta.content or "" for c in litellm.completion("triton/ensemble", **asked, stream=True)]
    assert len(pieces) > 1
    assert "".join(pieces) == texts[MAX_TOKENS]


@needs("genai-perf")
def test_genai_perf(server, tmp_path):
    """It starts the perf_analyzer that is on PATH."""
    tool = tmp_path / "perf_analyzer"
    tool.write_text(f'#!/bin/sh\nexec {ROOT}/build_scripts/perf_analyzer {ROOT}/build/perf_analyzer "$@"\n')
    tool.chmod(0o755)
    command = [Path(sys.executable).parent / "genai-perf", "profile", "-m", "ensemble", "--streaming"]
    command += ["--endpoint-type", "kserve", "--backend", "tensorrtllm", "-u", f"127.0.0.1:{server.grpc}"]
    command += ["--tokenizer", EXAMPLE, "--num-prompts", 4, "--request-count", 4, "--concurrency", 2]
    command += ["--synthetic-input-tokens-mean", 20, "--output-tokens-mean", 10, "--output-tokens-mean-deterministic"]
    command += ["--artifact-dir", tmp_path / "results"]
    environment = os.environ | {"PATH": f"{tmp_path}:{os.environ['PATH']}"}
    done = subprocess.run(list(map(str, command)), env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    [results] = tmp_path.glob("results/*/profile_export_genai_perf.json")
    results = json.loads(results.read_text())
    assert results["request_count"]["avg"] == 4
    assert results["output_sequence_length"]["avg"] == 10


#: A process of its own, since kserve and tritonclient define the same messages.
KSERVE = """
import asyncio, json, sys, kserve

grpc, http, prompt, max_tokens = sys.argv[1:]

def request(prompt):
    tensors = {"text_input": ("BYTES", prompt), "max_tokens": ("INT32", int(max_tokens))}
    tensors["exclude_input_in_output"] = ("BOOL", True)
    inputs = [kserve.InferInput(name, [1, 1], kind, [value]) for name, (kind, value) in tensors.items()]
    return kserve.InferRequest("ensemble", inputs)

async def ask():
    async with kserve.InferenceRESTClient(kserve.RESTConfig(protocol="v2")) as client:
        first = await client.infer(http, request(prompt), model_name="ensemble")
    async with kserve.InferenceGRPCClient(grpc) as client:
        second = await client.infer(request(prompt.encode()))
    texts = [answer.get_output_by_name("text_output").as_numpy()[0] for answer in (first, second)]
    print(json.dumps([text if isinstance(text, str) else text.decode() for text in texts]))

asyncio.run(ask())
"""


@needs("kserve")
def test_kserve(engine_dir, texts, tmp_path):
    with running_server(engine_dir, tmp_path, "--decoupled_mode", "false") as server:
        places = [f"127.0.0.1:{server.grpc}", f"http://127.0.0.1:{server.http}"]
        command = [sys.executable, "-c", KSERVE, *places, PROMPT, str(MAX_TOKENS)]
        done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout) == [texts[MAX_TOKENS]] * 2
