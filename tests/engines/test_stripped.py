"""Engines without weights on a real TensorRT: bit for bit what whole engines compute."""

from __future__ import annotations

import shutil

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from saw_trtllm import LLM, KvCacheConfig, SamplingParams
from saw_trtllm.backends.tensorrt.versions import TensorRT
from saw_trtllm.build import build, plan_build
from saw_trtllm.plan.options import BuildOptions
from saw_trtllm.refit import plan_refit, refit
from tests.engines.models import VOCAB, make_model

LIMITS = {"max_batch_size": 16, "max_num_tokens": 512, "max_seq_len": 512, "gather_all_token_logits": True}
PROMPTS = [np.random.default_rng(n).integers(3, VOCAB, n).tolist() for n in (5, 40, 100)]
CASES = [
    *[("llama", kv, "float16", "auto") for kv in ("fp16", "int4", "saw_int4")],
    ("qwen2", "saw_int4", "bfloat16", "auto"),
    ("qwen3", "saw_int4", "float16", "auto"),
    # The kernels of TensorRT's own GEMMs are chosen by their times in each build, so their last bits may differ.
    ("qwen3", "saw_int4", "float16", "disable"),
]
#: The same, and how weights are quantized.
QUANTIZED = [("llama", "saw_int4", "float16", "auto", "int4_wo"), ("qwen3", "saw_int4", "bfloat16", "auto", "fp8")]


@pytest.fixture(autouse=True)
def _can_strip():
    if not TensorRT.load().can_strip:
        pytest.skip("needs TensorRT 10.6 or newer")


def make(model, folder, **options):
    options = {"model_dir": model, "output_dir": folder, "backend": "tensorrt", **LIMITS, **options}
    size = build(plan_build(BuildOptions(**options)))
    return folder, size


def answers(folder):
    """Tokens, and the logits of prompts and texts in one row each."""
    params = SamplingParams(max_tokens=24, ignore_eos=True, return_context_logits=True, return_generation_logits=True)
    with LLM(folder, kv_cache_config=KvCacheConfig(max_tokens=4096)) as llm:
        outputs = llm.generate(PROMPTS, params)
    logits = [[o.context_logits, o.outputs[0].generation_logits] for o in outputs]
    return [o.outputs[0].token_ids for o in outputs], np.concatenate([x for pair in logits for x in pair])


@pytest.mark.parametrize(
    ("family", "kv", "dtype", "gemm_plugin", "qformat"), [*((*case, "auto") for case in CASES), *QUANTIZED]
)
def test_it_computes_what_the_whole_engine_does(family, kv, dtype, gemm_plugin, qformat, tmp_path):
    model = make_model(tmp_path / "model", family, 64)
    options = {"kv": kv, "dtype": dtype, "gemm_plugin": gemm_plugin, "qformat": qformat}
    options["builder_optimization_level"] = 0
    whole, size = make(model, tmp_path / "whole", **options)
    stripped, rest = make(model, tmp_path / "stripped", strip_plan=True, **options)
    assert rest < size
    (tokens, logits), (expected_tokens, expected) = answers(stripped), answers(whole)
    if gemm_plugin == "disable":
        assert np.abs(logits[: len(PROMPTS[0])] - expected[: len(PROMPTS[0])]).max() < 0.05
    else:
        assert tokens == expected_tokens
        np.testing.assert_array_equal(logits, expected)


def test_it_takes_other_weights_without_a_build(tmp_path):
    model = make_model(tmp_path / "model", "llama", 64)
    other = shutil.copytree(model, tmp_path / "other")
    weights = load_file(other / "model.safetensors")
    save_file({name: np.ascontiguousarray(x[::-1]) for name, x in weights.items()}, other / "model.safetensors")
    stripped, _ = make(model, tmp_path / "stripped", strip_plan=True, dtype="float16")
    whole, _ = make(other, tmp_path / "whole", dtype="float16")
    refit(stripped, plan_refit(stripped, other), tmp_path / "changed")
    (tokens, logits), (expected_tokens, expected) = answers(tmp_path / "changed"), answers(whole)
    assert tokens == expected_tokens
    np.testing.assert_array_equal(logits, expected)
