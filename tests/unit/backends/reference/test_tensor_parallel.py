"""An engine of several ranks computes what that of one rank does: logits, the rows of its cache, texts."""

from itertools import product

import numpy as np
import pytest
import torch

from saw_trtllm import LLM, KvCacheConfig, SamplingParams
from saw_trtllm import llm as llm_module
from saw_trtllm.backends.registry import open_executor
from saw_trtllm.build import build, plan_build
from saw_trtllm.checkpoint import Checkpoint
from saw_trtllm.checkpoint.calibration import Calibration, model_shape, probe_weights
from saw_trtllm.checkpoint.layout import kv_heads_of_rank
from saw_trtllm.engine.config import EngineConfig, engine_file
from saw_trtllm.engine.step import DECODE, PREFILL, StepPacker, StepSequence
from saw_trtllm.errors import ConfigError, EngineError
from saw_trtllm.plan.options import BuildOptions
from saw_trtllm.runtime.sampling import SamplingState
from tests.support.example import build_example
from tests.support.frames import random_frames
from tests.support.models import make_hf_model
from tests.support.ranks import RankThreads, local_group, on_ranks
from tests.support.tolerance import model_rounding

#: 2 KV heads, so that 4 ranks have each of them twice, and 8 four times; 203 tokens, which none of them divides.
FAMILIES = ("llama", "qwen2", "qwen3", "gemma2")
PROMPT = np.random.default_rng(3).integers(3, 203, 40).tolist()
CACHE = KvCacheConfig(max_tokens=128)
_LIMITS = {"backend": "reference", "max_batch_size": 4, "max_seq_len": 128, "max_num_tokens": 96}


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    root = tmp_path_factory.mktemp("models")
    return {family: make_hf_model(root, family)[0] for family in FAMILIES}


def engine(output_dir, model_dir, tp_size, **options):
    options = _LIMITS | {"model_dir": model_dir, "tp_size": tp_size} | options
    build(plan_build(BuildOptions(output_dir=output_dir, **options)))
    return output_dir, EngineConfig.load(output_dir)


def run(executor, config, *spans):
    """Logits of the prompt's tokens, computed in so many at a time, and of a decode after each."""
    found, done = [], 0
    for count in spans:
        kind = DECODE if count == 1 else PREFILL
        layout = config.pool_layout
        sequence = StepSequence(PROMPT[done : done + count], done, 40, kind, layout.entries([0, 1, 2]))
        step = StepPacker(layout).pack([sequence])
        found.append(executor.launch(step, [SamplingState(SamplingParams(), PROMPT, [])], [True]).result().logits[0])
        done += count
    return np.concatenate(found)


@pytest.mark.parametrize(("family", "tp_size"), [*product(FAMILIES, (2, 4)), ("llama", 8)])
def test_logits_are_those_of_one_rank(family, tp_size, models, tmp_path):
    """In fp32, cache and all, where only the order of sums differs: chunks with history, and a decode."""
    options = {"kv": "fp16", "dtype": "float32", "gather_all_token_logits": True}
    whole, config = engine(tmp_path / "1", models[family], 1, **options)
    expected = run(open_executor(whole, config, CACHE), config, 20, 19, 1)
    split, config = engine(tmp_path / "n", models[family], tp_size, **options)
    ranks = RankThreads(split, config, CACHE)
    logits = run(ranks, config, 20, 19, 1)
    ranks.shutdown()
    assert np.abs(expected).max() > 1
    assert logits.shape == expected.shape == (40, 203)
    assert np.abs(logits - expected).max() <= model_rounding(expected)


@pytest.mark.parametrize(("qformat", "tp_size"), [("int4_wo", 2), ("int4_wo", 4), ("fp8", 4)])
def test_quantized_weights_are_split_between_groups(qformat, tp_size, tmp_path):
    """Groups of 128 columns: each rank has whole ones; FP8's rows have one scale, which all ranks have."""
    folder = make_hf_model(tmp_path, "llama", intermediate_size=512)[0]
    options = {"kv": "fp16", "dtype": "float32", "qformat": qformat, "gather_all_token_logits": True}
    whole, config = engine(tmp_path / "1", folder, 1, **options)
    expected = run(open_executor(whole, config, CACHE), config, 20, 19, 1)
    split, config = engine(tmp_path / "n", folder, tp_size, **options)
    ranks = RankThreads(split, config, CACHE)
    logits = run(ranks, config, 20, 19, 1)
    ranks.shutdown()
    assert np.abs(logits - expected).max() <= model_rounding(expected)


@pytest.mark.parametrize(
    ("family", "tp_size", "options"),
    [("qwen2", 2, {}), ("gemma2", 4, {"kv_skip_layers": "1"}), ("qwen3", 2, {"calibration": True}), ("llama", 4, {})],
)
def test_codes_are_those_of_one_rank(family, tp_size, options, models, tmp_path):
    """Of a prefill: each rank has the rows of its heads, but where a sum's rounding moves a value over a code's edge.

    Sums of fp32 differ by some dozens of 2⁻²⁴, and codes are 1/15 of a range apart: one value in about 10⁴ lies that
    near to an edge, and then has the next code.
    """
    if "calibration" in options:
        options = {"calibration": tmp_path / "calibration"}
        write_calibration(models[family], options["calibration"])
    options = {"kv": "saw_int4", "dtype": "float32"} | options
    whole, config = engine(tmp_path / "1", models[family], 1, **options)
    one = open_executor(whole, config, CACHE)
    split, config = engine(tmp_path / "n", models[family], tp_size, **options)
    ranks = RankThreads(split, config, CACHE)
    run(one, config, 40)
    run(ranks, config, 40)
    heads = config.pretrained_config.num_key_value_heads
    for rank, executor in enumerate(ranks.ranks):
        for ours, theirs in zip(executor.cache.pools, one.cache.pools, strict=True):
            rows, due = (pool.data[0].contiguous() for pool in (ours, theirs))
            due = due[:, :, kv_heads_of_rank(heads, tp_size, rank)]
            assert rows.shape == due.shape
            if ours.format.quantized:
                assert (rows != due).float().mean() < 1e-3
                codes, expected = (x[..., : ours.format.head_dim // 2] for x in (rows, due))
                for shift in (0, 4):
                    step = (codes >> shift & 15).int() - (expected >> shift & 15).int()
                    assert step.abs().max() <= 1
            else:
                torch.testing.assert_close(rows.view(torch.float32), due.contiguous().view(torch.float32))
    ranks.shutdown()


def write_calibration(model_dir, path):
    checkpoint = Checkpoint.open(model_dir)
    c = checkpoint.config
    layers, heads, dim = c.num_hidden_layers, c.num_key_value_heads, c.head_size
    frames = [random_frames((layers, heads), dim, seed, condition=4.0)[0] for seed in (1, 2)]
    center = np.random.default_rng(5).standard_normal((layers, heads, dim)).astype(np.float32)
    Calibration(center, *frames, model_shape(checkpoint), probe_weights(checkpoint), 1).save(path)


@pytest.mark.parametrize(("kv", "num_texts", "num_tokens"), [("fp16", 8, 16), ("saw_int4", 4, 1)])
def test_texts_of_the_example_model(kv, num_texts, num_tokens, tmp_path, monkeypatch):
    """With prefixes that are found again, chunks, and preemption: through the runtime as it is.

    In fp32 the order of sums moves no token. It may move a value over the edge of a 4-bit code, so that of such a cache
    only those tokens are compared that read none: the first ones of the prompts that came first.
    """
    prompts = ["def main():", "class Queue:\n    def put(self, item):", "import os\nimport sys\n", "for i in range("]
    params = [SamplingParams(max_tokens=16, **({"temperature": 0.8, "seed": 7} if i == 2 else {})) for i in range(4)]
    texts = []
    for tp_size in (1, 2, 4):
        folder = build_example(tmp_path / str(tp_size), kv=kv, tp_size=tp_size, dtype="float32")
        if tp_size > 1:  # in threads; what runs ranks as processes has tests of its own
            monkeypatch.setattr(llm_module, "open_executor", lambda *arguments: RankThreads(*arguments[:3]))
        with LLM(folder, prefill_chunk=32, kv_cache_config={"max_tokens": 160}) as llm:
            outputs = llm.generate(prompts * 2, params * 2)
        assert [len(output.outputs[0].token_ids) for output in outputs] == [16] * 8
        texts.append([output.outputs[0].token_ids[:num_tokens] for output in outputs[:num_texts]])
    assert texts[1] == texts[2] == texts[0]


# -- what cannot work


@pytest.mark.parametrize(
    ("tp_size", "sentence"),
    [
        (3, "tp_size 3 does not divide num_attention_heads 8: choose one that does"),
        (16, "tp_size 16 does not divide num_attention_heads 8: choose one that does"),
    ],
)
def test_heads_that_do_not_split(tp_size, sentence, models, tmp_path):
    with pytest.raises(ConfigError, match=sentence):
        engine(tmp_path, models["llama"], tp_size)


def test_kv_heads_that_do_not_split(tmp_path):
    folder, _ = make_hf_model(tmp_path, "llama", num_attention_heads=12, num_key_value_heads=3)
    with pytest.raises(ConfigError, match="tp_size 2 neither divides nor is a multiple of num_key_value_heads 3"):
        engine(tmp_path / "engine", folder, 2)


def test_a_rank_that_is_missing_or_alone(models, tmp_path):
    folder, config = engine(tmp_path, models["llama"], 2)
    with pytest.raises(EngineError, match="is split over 2 ranks and 1 opened it: open it with 2"):
        open_executor(folder, config, CACHE)
    (folder / engine_file(1)).unlink()
    with pytest.raises(EngineError, match=r"rank1\.engine does not exist"):
        on_ranks(local_group(2)[1:], lambda ours: _open_without_rank_0(folder, config, ours))


def _open_without_rank_0(folder, config, ours):
    from saw_trtllm.backends.registry import BACKENDS

    return BACKENDS["reference"].open_executor(folder, config, CACHE, ours)


def test_ranks_with_two_builds_of_an_engine(models, tmp_path):
    """Of one shape: only the checksums tell them apart."""
    built = [engine(tmp_path / kv, models["llama"], 2, kv=kv) for kv in ("saw_int4", "int4")]

    def open_own(ours):
        with pytest.raises(EngineError, match=f"rank {1 - ours.rank} has another build of the engine"):
            open_executor(*built[ours.rank], CACHE, ours)

    on_ranks(local_group(2), open_own)


def test_a_rebuild_over_fewer_ranks_leaves_no_rank_behind(models, tmp_path):
    engine(tmp_path, models["llama"], 4)
    engine(tmp_path, models["llama"], 2)
    assert sorted(path.name for path in tmp_path.glob("rank*")) == ["rank0.engine", "rank1.engine"]


def test_a_split_embedding_is_no_part_of_the_model(models, tmp_path):
    """An engine's config names it in TensorRT-LLM's words; one of one rank has none."""
    _, config = engine(tmp_path, models["llama"], 2)
    assert config.pretrained_config.model_extra["use_parallel_embedding"] is True
    assert config.of_rank().bytes_per_token * 2 == config.bytes_per_token
    assert config.tp_size == 2
