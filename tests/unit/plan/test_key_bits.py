"""Keys in 8 bits beside values in 4: a whole cache of them, or some layers of a 4-bit cache."""

import numpy as np
import pytest
import torch

from saw_trtllm import LLM, SamplingParams
from saw_trtllm.backends.reference.cache import PagedCache, PagedPool
from saw_trtllm.backends.reference.int4 import encode_rows
from saw_trtllm.backends.reference.model import ReferenceModel
from saw_trtllm.backends.reference.quantizers import QuantizedRows, SkipLayers
from saw_trtllm.backends.reference.window import WindowModel
from saw_trtllm.backends.tensorrt.backend import TensorRTBackend
from saw_trtllm.backends.tensorrt_llm.limits import TensorRTLLMLimits
from saw_trtllm.checkpoint import Checkpoint
from saw_trtllm.cli import build as saw_build
from saw_trtllm.engine.config import EngineConfig
from saw_trtllm.engine.pools import Pool
from saw_trtllm.engine.step import DECODE, StepInputs, StepSequence
from saw_trtllm.errors import ConfigError
from saw_trtllm.format import KVFormat
from saw_trtllm.plan.options import BuildOptions
from saw_trtllm.plan.plan import layers_apart
from tests.support.example import EXAMPLE, build_example
from tests.support.models import make_hf_model


def test_layers_are_stored_as_they_are_evaluated(tmp_path):
    """Decoded token by token from pages: what the whole-window model of the evaluation gives, which has none."""
    checkpoint = Checkpoint.open(make_hf_model(tmp_path, "llama")[0])
    prompt = np.random.default_rng(3).integers(3, 203, 40).tolist()
    narrow = KVFormat("saw_int4", 64, "float32", rotate_v=False)
    wide = narrow.with_8bit_keys()
    pools = [Pool(narrow, [0, 2]), Pool(wide, [1], region=1)]
    cache = PagedCache(pools, 8, checkpoint.config.num_key_value_heads, 16)
    model, logits = ReferenceModel(checkpoint.config, checkpoint.load, 128), []
    for start, token in enumerate(prompt):
        sequence = StepSequence([token], start, len(prompt), DECODE, [6, 1, 5])
        logits.append(model.forward(StepInputs.pack([sequence], 2, 1), cache))

    window = WindowModel(checkpoint.config, checkpoint.load, 40)
    every = QuantizedRows(narrow)
    some = SkipLayers(every, [1], QuantizedRows(wide, narrow))
    expected, without = (window.logits(window.hidden(torch.tensor([prompt]), x))[0] for x in (some, every))
    # Sums in another order, and with them a few 8-bit codes that are within it of a tie: a 255th of a row's range each.
    torch.testing.assert_close(torch.cat(logits), expected, atol=1e-3, rtol=0)
    assert (without - expected).abs().max() > 0.02


def test_rows_of_two_sizes_lie_apart_and_move_as_bytes(rng):
    """K's rows before V's in each layer, and the first rows of a block copied alone."""
    pool = PagedPool(KVFormat("saw_k8v4", 64), 3, 2, 2, 16)
    pool.data.zero_()
    assert pool.data.shape == (3, 2, 2, 16, 68 + 36)
    x = torch.randn(16, 2, 64, generator=rng)
    blocks, offsets = torch.full((16,), 1), torch.arange(16)
    pool.write(1, blocks, offsets, x, x)
    for wide, rows in zip((True, False), pool.data[1, 1].flatten().split([2 * 16 * 68, 2 * 16 * 36]), strict=True):
        assert torch.equal(rows.view(2, 16, -1), encode_rows(x.transpose(0, 1), pool.format, wide=wide))
    step = (x.amax(-1) - x.amin(-1)).max()
    for found, levels in zip(pool.read(1, torch.tensor([[1]])), (255, 15), strict=True):
        error = (found[0] - x.transpose(0, 1)).abs().max()
        assert step / levels / 4 < error < step / levels
    cache = PagedCache([Pool(pool.format, [0, 1])], 3, 2, 16)
    cache.pools[0].data.copy_(pool.data)
    cache.copy([(1, 2, 5)])
    for source, target in cache.pools[0].read(1, torch.tensor([[1], [2]])):
        assert torch.equal(source[:, :5], target[:, :5])
        assert target[:, 5:].count_nonzero() == 0


def test_8_bit_keys_bring_an_engine_nearer_to_the_exact_one(tmp_path):
    """Some layers' do, and all layers' more; capacity counts their bytes."""
    prompt = np.random.default_rng(5).integers(10, 1000, 130).tolist()
    found = {}
    for name, options in (
        ("exact", {"kv": "fp16"}),
        ("narrow", {}),
        ("some", {"kv_bits": "8/4:0,2,last"}),
        ("wide", {"kv": "saw_k8v4"}),
    ):
        folder = build_example(tmp_path / name, gather_all_token_logits=True, max_num_tokens=4096, **options)
        with LLM(folder, prefill_chunk=32) as llm:
            params = SamplingParams(max_tokens=1, return_context_logits=True)
            found[name] = llm.generate(prompt, params).context_logits[32:]
    narrow, some, wide = (np.square(found[x] - found["exact"]).mean() for x in ("narrow", "some", "wide"))
    assert 0 < wide < some < narrow
    rows = {name: EngineConfig.load(tmp_path / name).bytes_per_token for name in ("narrow", "some", "wide")}
    assert rows == {"narrow": 4 * 2 * 136, "some": 3 * 2 * 200 + 2 * 136, "wide": 4 * 2 * 200}


def test_the_plan_says_what_a_token_takes(capsys):
    argv = ["--model_dir", str(EXAMPLE), "--backend", "reference", "--dry_run"]
    assert saw_build.main([*argv, "--kv", "saw_k8v4"]) == 0
    assert "saw_k8v4, rows of 132 and 68 bytes" in capsys.readouterr().out
    assert saw_build.main([*argv, "--kv_bits", "8/4:1,last", "--kv_skip_layers", "0"]) == 0
    assert "layers 1, 3 with keys in 8 bits, layer 0 in float16" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("kv", "skipped", "bits", "said"),
    [
        ("saw_int4", None, "4/4:0", "give 8/4, a colon and layers"),
        ("saw_int4", None, "8/4", "give 8/4, a colon and layers"),
        ("saw_int4", None, "8/4:7", "kv_bits names '7' and the model has the layers 0 to 3"),
        ("saw_int4", None, "8/4:0,1,2,3", "kv_bits names all 4 layers: give --kv saw_k8v4"),
        ("saw_int4", "0,1", "8/4:1,2", "both name layer 1"),
        ("saw_int4", "0,1", "8/4:2,3", "name all 4 layers"),
        ("int4", None, "8/4:0", "it is for layers of saw_int4"),
        ("saw_k8v4", None, "8/4:0", "it is for layers of saw_int4"),
    ],
)
def test_bits_that_no_cache_has(kv, skipped, bits, said):
    with pytest.raises(ConfigError, match=said):
        layers_apart(skipped, bits, KVFormat(kv, 64), 4)


def test_where_8_bits_cannot_be_had():
    """The write has one rotation of them, and TensorRT-LLM's executor one size of rows."""
    model = Checkpoint.open(EXAMPLE).config
    for options, said in (({"kv": "saw_k8v4"}, "--kv saw_k8v4"), ({"kv_bits": "8/4:0"}, "--kv_bits")):
        given = BuildOptions(model_dir=EXAMPLE, hadamard_order=32, **options)
        with pytest.raises(ConfigError, match=f"{said} was given with --hadamard_order 32.* of order 128 alone"):
            TensorRTBackend().check(given, model, {})
        with pytest.raises(ConfigError, match=f"{said} was given, and TensorRT-LLM's executor has rows of one size"):
            TensorRTLLMLimits().check(BuildOptions(model_dir=EXAMPLE, **options), model, {})
