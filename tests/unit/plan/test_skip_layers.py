"""Layers whose cache stays in the engine's own dtype: a second pool under the same blocks."""

from types import SimpleNamespace

import numpy as np
import psutil
import pytest
import torch

from saw_trtllm import LLM, KvCacheConfig, SamplingParams
from saw_trtllm.backends.reference.cache import PagedCache
from saw_trtllm.backends.reference.model import ReferenceModel
from saw_trtllm.backends.reference.quantizers import QuantizedRows, SkipLayers
from saw_trtllm.backends.reference.window import WindowModel
from saw_trtllm.build import build, plan_build
from saw_trtllm.checkpoint import Checkpoint
from saw_trtllm.cli import build as saw_build
from saw_trtllm.engine.config import EngineConfig
from saw_trtllm.engine.pools import Pool
from saw_trtllm.engine.step import DECODE, PREFILL, StepInputs, StepSequence
from saw_trtllm.errors import ConfigError, EngineError
from saw_trtllm.format import KVFormat
from saw_trtllm.plan.options import BuildOptions
from saw_trtllm.plan.plan import parse_layers
from saw_trtllm.runtime.tokenizer import Tokenizer
from tests.support.example import EXAMPLE, build_example
from tests.support.models import make_hf_model
from tests.support.tolerance import model_rounding
from tests.support.turns import generate_at_once

#: Of the example: K and V of 2 heads of 128, in 4 bits and in 16.
INT4, FP16 = 2 * 2 * 68, 2 * 2 * 256


@pytest.fixture(scope="module")
def engine(tmp_path_factory):
    """The example's with its first and last layer in fp16."""
    return build_example(
        tmp_path_factory.mktemp("skip"), kv_skip_layers="0,last", gather_all_token_logits=True, max_num_tokens=4096
    )


@pytest.fixture
def open_llm(engine):
    opened = []

    def open_(folder=engine, **options):
        opened.append(LLM(folder, **{"kv_cache_config": KvCacheConfig(deterministic=True)} | options))
        return opened[-1]

    yield open_
    for llm in opened:
        llm.shutdown()


def requests(count, max_tokens):
    """Prompts with common beginnings; every other one sampled."""
    text = "import os\n\n\nclass Node:\n    def __init__(self, name):\n        self.name = name\n"
    ids, rng = Tokenizer.load(EXAMPLE).encode(text * 8), np.random.default_rng(11)
    prompts, params = [], []
    for i in range(count):
        prompts.append(ids[: (0, 20, 70, 130)[i % 4]] + rng.integers(10, 1000, rng.integers(1, 30)).tolist())
        sampled = {"temperature": 1.0, "seed": i} if i % 2 else {}
        params.append(SamplingParams(max_tokens=max_tokens, ignore_eos=True, **sampled))
    return prompts, params


def token_ids(outputs):
    return [o.outputs[0].token_ids for o in outputs]


# -- what is stored


def cache_and_logits(checkpoint, pools, steps, prompt):
    """A sequence that goes through ``steps`` of so many tokens."""
    config = checkpoint.config
    model = ReferenceModel(config, checkpoint.load, 128)
    cache = PagedCache(pools, 8, config.num_key_value_heads, 16)
    for pool in cache.pools:
        pool.data.fill_(0xFF)  # NaN in scales and in 16-bit rows
    logits, start = [], 0
    for count in steps:
        kind = DECODE if count == 1 else PREFILL
        sequence = StepSequence(prompt[start : start + count], start, len(prompt), kind, [6, 1, 5, 0, 3])
        inputs = StepInputs.pack([sequence], *(len(pool.layers) for pool in pools))
        logits.append(model.forward(inputs, cache, all_logits=True))
        start += count
    return cache, torch.cat(logits)


@pytest.mark.parametrize("kv", ["int4", "saw_int4"])
def test_each_layer_is_stored_in_its_own_format(kv, tmp_path):
    """Decoded token by token: what the whole-window model of the evaluation gives, whose cache is no pages at all."""
    checkpoint = Checkpoint.open(make_hf_model(tmp_path, "llama")[0])
    prompt = np.random.default_rng(3).integers(3, 203, 40).tolist()
    quantized, exact = KVFormat(kv, 64, "float32", rotate_v=False), KVFormat("fp16", 64, "float32")
    cache, logits = cache_and_logits(
        checkpoint, [Pool(quantized, [0, 2]), Pool(exact, [1], region=1)], [1] * 40, prompt
    )
    assert [pool.data.shape[1] for pool in cache.pools] == [2, 1]
    assert [cache.place(i) for i in range(3)] == [
        (cache.pools[0], 0, 0),
        (cache.pools[1], 0, 0),
        (cache.pools[0], 1, 0),
    ]
    assert all((pool.data[[6, 1]] != 0xFF).any(-1).all() for pool in cache.pools)
    assert all((pool.data[[2, 4, 7]] == 0xFF).all() for pool in cache.pools)

    model = WindowModel(checkpoint.config, checkpoint.load, 40)
    every, some = QuantizedRows(quantized), SkipLayers(QuantizedRows(quantized), [1], model.exact)
    ids = torch.tensor([prompt])
    expected = model.logits(model.hidden(ids, some))[0]
    torch.testing.assert_close(logits, expected, atol=model_rounding(expected), rtol=0)
    assert (model.logits(model.hidden(ids, every))[0] - expected).abs().max() > 0.02


def test_chunks_read_the_history_of_both_pools(tmp_path):
    """The skipped layers' chunks give what one chunk does; where all but one layer is skipped, that one alone tells."""
    checkpoint = Checkpoint.open(make_hf_model(tmp_path, "qwen3")[0])
    prompt = np.random.default_rng(3).integers(3, 203, 60).tolist()
    quantized, exact = KVFormat("int4", 64, "float32"), KVFormat("fp16", 64, "float32")
    steps = [25, 20, 1, 1, 13]
    first = cache_and_logits(checkpoint, [Pool(quantized, [2]), Pool(exact, [0, 1], region=1)], steps, prompt)[1]
    whole = cache_and_logits(checkpoint, [Pool(exact, [0, 1, 2])], steps, prompt)[1]
    torch.testing.assert_close(first[:25], whole[:25], atol=model_rounding(whole), rtol=0)  # no history yet
    difference = (first - whole)[25:].abs().amax(-1)
    assert (difference > 1e-4).all()
    assert difference.max() < 1


def test_pools_and_offsets():
    sequences = [StepSequence([1, 2], 0, 2, PREFILL, [5, 7]), StepSequence([3], 9, 4, DECODE, [2])]
    offsets = StepInputs.pack(sequences, 3, 2).kv_cache_block_offsets
    assert offsets[:, 0].tolist() == [[[30, 42], [31, 43]], [[20, 28], [21, 29]]]
    assert offsets[:, 1, :, :1].tolist() == [[[12], [13]], [[8], [9]]]


def test_v_is_rotated_in_the_weights_of_quantized_layers_alone(engine):
    plan = plan_build(BuildOptions(model_dir=EXAMPLE, kv_skip_layers="0,last"))
    name = "transformer.layers.{}.attention.dense.weight"
    same = [np.array_equal(plan.weights.load(name.format(i)), plan.checkpoint.load(name.format(i))) for i in range(4)]
    assert same == [True, False, False, True]


# -- the runtime


def test_batch_reuse_and_preemption_do_not_change_a_token(open_llm):
    prompts, params = requests(8, 40)
    llm = open_llm(prefill_chunk=32, kv_cache_config=KvCacheConfig(enable_block_reuse=False))
    alone = token_ids(llm.generate(p, s) for p, s in zip(prompts, params, strict=True))
    assert len(set(map(tuple, alone))) == 8
    llm = open_llm(prefill_chunk=32)
    assert token_ids(llm.generate(prompts, params)) == alone
    assert token_ids(llm.generate(prompts, params)) == alone
    assert llm.stats().reused_tokens_total > 100
    llm = open_llm(prefill_chunk=32, kv_cache_config=KvCacheConfig(320, deterministic=True))
    assert token_ids(generate_at_once(llm, prompts, params)) == alone
    assert llm.stats().preemptions_total > 0


def test_skipped_layers_bring_the_model_nearer_to_the_exact_one(open_llm, engine, tmp_path):
    prompt = requests(4, 1)[0][3]
    params = SamplingParams(max_tokens=1, return_context_logits=True)

    def logits(folder):
        return open_llm(folder, prefill_chunk=32).generate(prompt, params).context_logits[32:]

    options = {"gather_all_token_logits": True, "max_num_tokens": 4096}
    exact = logits(build_example(tmp_path / "fp16", kv="fp16", **options))
    every = logits(build_example(tmp_path / "every", **options))
    most = logits(build_example(tmp_path / "most", kv_skip_layers="0,1,3", **options))
    some, most, every = (np.square(x - exact).mean() for x in (logits(engine), most, every))
    assert 0 < most < some < every


def test_capacity_counts_the_bytes_of_both_pools(engine, monkeypatch, open_llm):
    config = EngineConfig.load(engine)
    assert config.bytes_per_token == 2 * INT4 + 2 * FP16
    available = 1000 * 32 * config.bytes_per_token
    monkeypatch.setattr(psutil, "virtual_memory", lambda: SimpleNamespace(available=available))
    llm = open_llm(kv_cache_config=KvCacheConfig(free_gpu_memory_fraction=0.5))
    assert llm.stats().max_blocks == 500
    pools = llm._core._executor.cache.pools
    assert sum(pool.data.nbytes for pool in pools) == available // 2
    assert [pool.data.shape for pool in pools] == [(500, 2, 2, 2, 32, 68), (500, 2, 2, 2, 32, 256)]


def test_the_plan_says_what_a_token_takes(engine, capsys):
    argv = ["--model_dir", str(EXAMPLE), "--kv_skip_layers", "0", "--dry_run"]
    assert saw_build.main(argv) == 0
    out = capsys.readouterr().out
    assert "layer 0 in float16" in out
    assert f"KV per token     {3 * INT4 + FP16:,} bytes, {4 * FP16:,} in float16: 2.23x" in out


# -- what is rejected


def test_layers_are_named_by_number_or_last():
    assert parse_layers(None, 4) == []
    assert parse_layers("last", 4) == [3]
    assert parse_layers("2, 0,last,2", 4) == [0, 2, 3]


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("4", "'4' and the model has the layers 0 to 3"),
        ("-1", "'-1'"),
        ("0,first", "'first'"),
        ("", "''"),
        ("0,,1", "''"),
        ("1.0", "'1.0'"),
        ("0,1,2,last", "names all 4 layers"),
    ],
)
def test_layers_that_there_are_not(text, said, tmp_path, capsys):
    with pytest.raises(ConfigError, match=said.replace("(", r"\(")):
        parse_layers(text, 4)
    argv = ["--model_dir", EXAMPLE, "--output_dir", tmp_path / "e", f"--kv_skip_layers={text}"]
    assert saw_build.main([str(a) for a in argv]) == 2
    out, err = capsys.readouterr()
    assert (out, err.count("\n")) == ("", 1)
    assert said in err
    assert not (tmp_path / "e").exists()


def test_a_cache_without_4_bits_has_nothing_to_skip():
    with pytest.raises(ConfigError, match="--kv fp16"):
        plan_build(BuildOptions(model_dir=EXAMPLE, kv="fp16", kv_skip_layers="0"))


@pytest.mark.parametrize("layers", [[4], [-1], [0, 0], [2, 1], [0, 1, 2, 3]])
def test_a_damaged_engine_is_rejected(layers, tmp_path):
    plan = plan_build(BuildOptions(model_dir=EXAMPLE, output_dir=tmp_path / "e", kv_skip_layers="0"))
    build(plan)
    plan.config.saw_int4.kv_skip_layers = layers
    plan.config.save(tmp_path / "e")
    with pytest.raises(EngineError, match="damaged: it skips the layers"):
        EngineConfig.load(tmp_path / "e")
