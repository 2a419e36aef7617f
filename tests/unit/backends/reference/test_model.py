"""Engines against transformers' own model classes, in fp32 and with a cache of fp32 unless a test says otherwise."""

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file
from transformers import AutoModelForCausalLM

from saw_trtllm import LLM, SamplingParams
from saw_trtllm.backends.reference.cache import PagedCache
from saw_trtllm.backends.reference.model import ReferenceModel
from saw_trtllm.build import build, plan_build
from saw_trtllm.checkpoint import Checkpoint
from saw_trtllm.engine.pools import Pool
from saw_trtllm.engine.step import DECODE, PREFILL, StepInputs, StepSequence
from saw_trtllm.errors import ConfigError
from saw_trtllm.format import KVFormat, rotate
from saw_trtllm.model.fold import fold_v_rotation
from saw_trtllm.plan.options import BuildOptions
from tests.support.example import EXAMPLE
from tests.support.models import LINEAR_ROPE, YARN_ROPE, make_hf_model
from tests.support.tolerance import chain_rounding, example_rounding, model_rounding

MODELS = {
    "llama": ("llama", {}),
    "llama, tied": ("llama", {"tie_word_embeddings": True}),
    "llama, head_dim 96, MHA": ("llama", {"head_dim": 96, "num_attention_heads": 2}),
    "llama, head_dim 128, MQA": ("llama", {"head_dim": 128, "num_attention_heads": 4, "num_key_value_heads": 1}),
    "llama, head_dim 256": ("llama", {"head_dim": 256, "num_attention_heads": 2, "num_key_value_heads": 1}),
    "llama, linear rope": ("llama", {"rope_parameters": LINEAR_ROPE}),
    "llama, yarn rope": ("llama", {"rope_parameters": YARN_ROPE}),
    "llama 3 rope": ("llama3", {}),
    "mistral, window 12": ("mistral", {}),
    "mistral, no window": ("mistral", {"sliding_window": None}),
    "qwen2, bias": ("qwen2", {}),
    "qwen2, window in the upper layers": (
        "qwen2",
        {"use_sliding_window": True, "sliding_window": 9, "max_window_layers": 1},
    ),
    "qwen3, q/k norm, tied": ("qwen3", {}),
    "qwen3, untied": ("qwen3", {"tie_word_embeddings": False}),
    "gemma2, softcaps, windows, 1 + w": ("gemma2", {}),
    "gemma2, no softcap, head_dim 256": (
        "gemma2",
        {"head_dim": 256, "num_attention_heads": 2, "attn_logit_softcapping": None, "final_logit_softcapping": None},
    ),
    "gemma3, two ropes, windows, q/k norm": ("gemma3", {}),
    "gemma3, head_dim 256, untied": (
        "gemma3",
        {"head_dim": 256, "num_attention_heads": 2, "tie_word_embeddings": False},
    ),
}
PROMPT = np.random.default_rng(3).integers(3, 203, 70).tolist()


def build_engine(model_dir, output_dir, **options):
    defaults = {"kv": "fp16", "dtype": "float32", "max_batch_size": 16, "max_num_tokens": 512, "tokens_per_block": 16}
    options = defaults | {"gather_all_token_logits": True} | options
    build(plan_build(BuildOptions(model_dir=model_dir, output_dir=output_dir, **options)))
    return output_dir


def hf_logits(model, ids):
    model.set_attn_implementation("eager")
    with torch.inference_mode():
        return model(torch.tensor([ids])).logits[0].numpy()


def context_logits(llm, *prompts):
    params = SamplingParams(max_tokens=1, return_context_logits=True)
    return [output.context_logits for output in llm.generate(list(prompts), params)]


# -- the whole model


@pytest.mark.parametrize("name", MODELS)
def test_logits_are_transformers(name, tmp_path):
    """Context logits in one chunk and in many, beside another prompt, and those of decodes."""
    family, fields = MODELS[name]
    folder, model = make_hf_model(tmp_path, family, **fields)
    engine = build_engine(folder, tmp_path / "engine")
    expected = hf_logits(model, PROMPT)
    assert np.abs(expected).max() > 1
    with LLM(engine) as llm:
        whole, part = context_logits(llm, PROMPT, PROMPT[:33])
        assert whole.dtype == np.float32
        np.testing.assert_allclose(whole, expected, rtol=0, atol=model_rounding(expected))
        np.testing.assert_allclose(part, expected[:33], rtol=0, atol=model_rounding(expected))
        params = SamplingParams(max_tokens=12, return_generation_logits=True, ignore_eos=True)
        answer = llm.generate(PROMPT, params).outputs[0]
    text = hf_logits(model, PROMPT + answer.token_ids)
    np.testing.assert_allclose(answer.generation_logits, text[len(PROMPT) - 1 : -1], rtol=0, atol=model_rounding(text))
    with LLM(engine, prefill_chunk=16) as llm:
        np.testing.assert_allclose(context_logits(llm, PROMPT)[0], expected, rtol=0, atol=model_rounding(expected))


@pytest.mark.parametrize("rope", [YARN_ROPE | {"original_max_position_embeddings": 32}, LINEAR_ROPE | {"factor": 4.0}])
def test_scaled_rope_reaches_beyond_the_original_length(tmp_path, rope):
    """Published settings leave max_position_embeddings at the original length: the factor times it is the limit."""
    folder, model = make_hf_model(tmp_path, "llama", max_position_embeddings=32, rope_parameters=rope)
    with pytest.raises(ConfigError, match=r"max_seq_len 129 is beyond .* 32, which RoPE scaling stretches to 128"):
        plan_build(BuildOptions(model_dir=folder, max_seq_len=129))
    assert plan_build(BuildOptions(model_dir=folder)).config.build_config.max_seq_len == 32
    with LLM(build_engine(folder, tmp_path / "engine", max_seq_len=128)) as llm:
        expected = hf_logits(model, PROMPT)
        np.testing.assert_allclose(context_logits(llm, PROMPT)[0], expected, rtol=0, atol=model_rounding(expected))


def test_the_example_is_transformers(tmp_path):
    model = AutoModelForCausalLM.from_pretrained(EXAMPLE, dtype=torch.float32)
    with LLM(build_engine(EXAMPLE, tmp_path / "engine")) as llm:
        expected = hf_logits(model, PROMPT)
        np.testing.assert_allclose(context_logits(llm, PROMPT)[0], expected, rtol=0, atol=example_rounding(expected))


def test_the_window_matters(tmp_path):
    """A model that ignored its window would differ by far more than the tolerance."""
    model = make_hf_model(tmp_path, "mistral")[1]
    windowed = hf_logits(model, PROMPT)
    model.config.sliding_window = None
    assert np.abs(hf_logits(model, PROMPT) - windowed).max() > 100 * model_rounding(windowed)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_16_bit_engines_are_near(dtype, tmp_path):
    folder, model = make_hf_model(tmp_path, "llama")
    with LLM(build_engine(folder, tmp_path / "engine", dtype=dtype)) as llm:
        difference = context_logits(llm, PROMPT)[0] - hf_logits(model, PROMPT)
    assert 0 < np.abs(difference).max() < {"float16": 0.05, "bfloat16": 0.4}[dtype]


def test_the_example_loses_little_to_4_bits(open_llm):
    """Cross-entropy of a text whose tokens all see their past in 4 bits, save those of their block."""
    text = (EXAMPLE / "train.py").read_text()[1500:3500]

    def loss(kv):
        llm = open_llm(kv, prefill_chunk=32)
        ids = llm.tokenizer.encode(text)[:600]
        logits = torch.from_numpy(context_logits(llm, ids)[0])
        return torch.nn.functional.cross_entropy(logits[:-1], torch.tensor(ids[1:])).item()

    exact, plain, rotated = (loss(kv) for kv in ("fp16", "int4", "saw_int4"))
    assert exact < np.log(1024) / 2  # it is trained
    assert plain != exact
    assert abs(rotated - exact) < 0.1


# -- V's rotation in the weights


def run_model(checkpoint, load, steps, kv_format):
    """All logits of a sequence that goes through ``steps`` of so many tokens."""
    config = checkpoint.config
    model = ReferenceModel(config, load, 128)
    cache = PagedCache([Pool(kv_format, range(config.num_hidden_layers))], 8, config.num_key_value_heads, 16)
    logits, start = [], 0
    for count in steps:
        ids, kind = PROMPT[start : start + count], DECODE if count == 1 else PREFILL
        sequence = StepSequence(ids, start, len(PROMPT), kind, [6, 1, 5, 0, 3])
        inputs = StepInputs.pack([sequence], config.num_hidden_layers)
        logits.append(model.forward(inputs, cache, all_logits=True))
        start += count
    return torch.cat(logits).numpy()


@pytest.mark.parametrize("order", [16, 64])
@pytest.mark.parametrize("family", ["llama", "qwen2"])
def test_folding_is_exact_to_fp32_rounding(family, order, tmp_path):
    checkpoint = Checkpoint.open(make_hf_model(tmp_path, family)[0])
    rotated = KVFormat("saw_int4", 64, hadamard_order=order)
    exact = KVFormat("fp16", 64, "float32")
    steps = [40, 20, 1, 1, 1]

    def folded(name):
        return fold_v_rotation(name, checkpoint.load(name), checkpoint.config, rotated)

    plain = run_model(checkpoint, checkpoint.load, steps, exact)
    np.testing.assert_allclose(run_model(checkpoint, folded, steps, exact), plain, rtol=0, atol=model_rounding(plain))


def test_folded_weights_rotate_v_and_nothing_else(tmp_path):
    """V of the folded weights and bias is the rotated V, and the folded output projection takes it back."""
    checkpoint = Checkpoint.open(make_hf_model(tmp_path, "qwen2")[0])
    config, kv_format = checkpoint.config, KVFormat("saw_int4", 64, hadamard_order=32)
    names = checkpoint.names()
    plain = {n: checkpoint.load(n) for n in names}
    folded = {n: fold_v_rotation(n, plain[n], config, kv_format) for n in names}
    unrotated = KVFormat("saw_int4", 64, rotate_v=False)
    assert all(fold_v_rotation(n, plain[n], config, unrotated) is plain[n] for n in names)
    layer = "transformer.layers.1.attention."
    changed = {n for n in names if not np.array_equal(plain[n], folded[n])}
    kinds = ("qkv.weight", "qkv.bias", "dense.weight")
    assert changed == {f"transformer.layers.{i}.attention.{k}" for i in range(3) for k in kinds}

    x = np.random.default_rng(0).standard_normal((5, config.hidden_size)).astype(np.float32)
    qkv, qkv_folded = (x @ w[layer + "qkv.weight"].T + w[layer + "qkv.bias"] for w in (plain, folded))
    first_v = (8 + 2) * 64
    np.testing.assert_array_equal(qkv_folded[:, :first_v], qkv[:, :first_v])
    v, v_folded = (t[:, first_v:].reshape(5, 2, 64) for t in (qkv, qkv_folded))
    np.testing.assert_allclose(v_folded, rotate(v, 32), rtol=0, atol=chain_rounding(96 + 32, np.abs(v).max()))
    out = np.repeat(v, 4, axis=1)  # any output of attention is a mean of V's rows
    projected = out.reshape(5, -1) @ plain[layer + "dense.weight"].T
    through_folded = rotate(out, 32).reshape(5, -1) @ folded[layer + "dense.weight"].T
    bound = chain_rounding(96 + 32 + 512, np.abs(projected).max())
    np.testing.assert_allclose(through_folded, projected, rtol=0, atol=bound)


@pytest.mark.parametrize("stored", [torch.float16, torch.bfloat16])
def test_folding_rounds_once_to_the_engines_dtype(stored, tmp_path):
    """Weights of 16 bits in an fp32 engine are folded in fp32, not rounded back to 16 bits on the way."""
    folder, _ = make_hf_model(tmp_path, "llama", dtype=stored)
    engine = build_engine(folder, tmp_path / "engine", kv="saw_int4")
    name = "transformer.layers.0.attention.dense.weight"
    expected = rotate(Checkpoint.open(folder).load(name).astype(np.float32), 64)
    np.testing.assert_array_equal(load_file(engine / "rank0.engine")[name], expected)


# -- bit for bit


@pytest.mark.parametrize("family", ["llama", "qwen3"])
def test_a_sequence_is_the_same_in_any_batch(family, tmp_path):
    """With one KV head and an odd inner size, where products and vector loops are at their most irregular."""
    checkpoint = Checkpoint.open(
        make_hf_model(
            tmp_path, family, num_key_value_heads=1, num_attention_heads=3, head_dim=128, intermediate_size=173
        )[0]
    )
    config = checkpoint.config
    model = ReferenceModel(config, checkpoint.load, 128)
    cache = PagedCache([Pool(KVFormat("saw_int4", 128, "float32"), range(config.num_hidden_layers))], 40, 1, 16)
    tables = [list(range(5 * i, 5 * i + 5)) for i in range(8)]

    def forward(*parts):
        sequences = [StepSequence(PROMPT[a : a + n], a, 60, kind, tables[i]) for i, a, n, kind in parts]
        return model.forward(StepInputs.pack(sequences, config.num_hidden_layers), cache).numpy()

    for i in range(8):
        forward((i, 0, 30 + i, PREFILL))
    for i in range(8):
        alone = forward((i, 30 + i, 1, DECODE))[0]
        decodes = [(j, 30 + j, 1, DECODE) for j in range(8)]
        np.testing.assert_array_equal(forward(*decodes)[i], alone)
        np.testing.assert_array_equal(forward((7, 0, 29, PREFILL), *decodes[: i + 1])[-1], alone)
