"""Which layers share a block table, and what that makes of a sequence's size."""

import json

import pytest

from saw_trtllm.checkpoint import Checkpoint
from saw_trtllm.engine.config import EngineConfig, SawSection
from saw_trtllm.engine.limits import BuildConfig
from saw_trtllm.engine.windows import first_block, most_blocks
from saw_trtllm.errors import EngineError
from saw_trtllm.format import KVFormat
from saw_trtllm.plan.windows import MAX_TABLES, layer_groups

#: Gemma 3 27B's config.json, as far as a cache goes.
GEMMA3_27B = {
    "architectures": ["Gemma3ForCausalLM"],
    "model_type": "gemma3_text",
    "torch_dtype": "bfloat16",
    "hidden_size": 5376,
    "intermediate_size": 21504,
    "num_hidden_layers": 62,
    "num_attention_heads": 32,
    "num_key_value_heads": 16,
    "head_dim": 128,
    "vocab_size": 262208,
    "max_position_embeddings": 131072,
    "sliding_window": 1024,
    "sliding_window_pattern": 6,
    "query_pre_attn_scalar": 168,
}


def engine_config(tmp_path, kv, max_seq_len, skipped=(), **fields):
    """Gemma 3 27B's, with other fields, and one table for all layers."""
    file = tmp_path / "config.json"
    file.write_text(json.dumps(GEMMA3_27B | fields))
    model = Checkpoint.of_config(file).config
    section = SawSection.of(KVFormat(kv, 128, "bfloat16"), "tensorrt", "test")
    return EngineConfig(
        version="test",
        pretrained_config=model,
        build_config=BuildConfig(max_batch_size=64, max_input_len=max_seq_len - 1, max_seq_len=max_seq_len),
        saw_int4=section.model_copy(update={"kv_skip_layers": list(skipped)}),
    )


def grouped(config):
    groups = layer_groups(config)
    return config.model_copy(update={"saw_int4": config.saw_int4.model_copy(update={"kv_groups": groups})})


def test_gemma3_27b_holds_18_times_the_tokens_of_fp16_without_bounds(tmp_path):
    """16,640 MB of fp16 for 32,768 tokens; in 4 bits 10 layers of them all and 52 of 1,024 and a block."""
    longest = 32768
    config = grouped(engine_config(tmp_path, "saw_int4", longest))
    fp16 = longest * 62 * 16 * 2 * 2 * 128
    assert engine_config(tmp_path, "fp16", longest).sequence_bytes(longest) == fp16
    least = (10 * longest + 52 * 1024) * 16 * 2 * 68
    assert least < config.sequence_bytes(longest) < 1.05 * least
    assert fp16 / config.sequence_bytes(longest) >= 18
    blocks = (40 << 30) // config.block_bytes
    assert config.tokens_of_blocks(blocks) * fp16 // longest >= 18 * (40 << 30)
    # Of short sequences as many as without windows, but for what even groups leave empty of a block.
    assert config.sequence_bytes(512) < 1.15 * engine_config(tmp_path, "saw_int4", longest).sequence_bytes(512)


@pytest.mark.parametrize("max_seq_len", [1025, 4096, 131072])
@pytest.mark.parametrize("skipped", [(), (0, 61), (5,)])
def test_groups_hold_each_layer_once_and_one_window_each(skipped, max_seq_len, tmp_path):
    config = grouped(engine_config(tmp_path, "saw_int4", max_seq_len, skipped))
    groups = config.saw_int4.kv_groups or [list(range(62))]
    assert sorted(i for group in groups for i in group) == list(range(62))
    assert len(groups) <= MAX_TABLES
    assert all(len({config.window(i) for i in group}) == 1 for group in config.saw_int4.kv_groups)
    assert sorted(i for pool in config.pools for i in pool.layers) == list(range(62))
    for pool in config.pools:
        region = config.regions[pool.region]
        assert pool.format == region.format
        assert len(pool.layers) <= region.num_layers
    whole = engine_config(tmp_path, "saw_int4", max_seq_len, skipped)
    assert config.sequence_bytes(max_seq_len) <= whole.sequence_bytes(max_seq_len)


def test_without_windows_all_layers_have_one_table(tmp_path):
    assert layer_groups(engine_config(tmp_path, "saw_int4", 1024)) == []
    every = engine_config(tmp_path, "saw_int4", 4096, sliding_window_pattern=63)
    assert layer_groups(every) == [list(range(62))]
    whole = engine_config(tmp_path, "saw_int4", 4096)
    assert (len(whole.pools), whole.windows, whole.block_bytes) == (1, [None], 32 * whole.bytes_per_token)


@pytest.mark.parametrize(
    ("groups", "said"), [([[0, 1]], "not all layers, each once"), ([list(range(62))], "have other windows")]
)
def test_groups_that_are_damaged_are_said(groups, said, tmp_path):
    config = engine_config(tmp_path, "saw_int4", 4096)
    config.saw_int4.kv_groups = groups
    config.save(tmp_path)
    with pytest.raises(EngineError, match=said):
        EngineConfig.load(tmp_path)


@pytest.mark.parametrize("max_seq_len", [1000, 4096, 5001, 131072])
def test_a_pool_has_its_blocks_again_from_its_tokens(max_seq_len, tmp_path):
    """Ranks that start anew are told of the tokens: one block less, and the group would not come back."""
    config = grouped(engine_config(tmp_path, "saw_int4", max_seq_len))
    least = config.blocks_for(max_seq_len, config.build_config.prefill_chunk)
    for num_blocks in range(least, least + 500):
        assert config.blocks_of_tokens(config.tokens_of_blocks(num_blocks) + 1) == num_blocks


@pytest.mark.parametrize("tokens_per_block", [2, 16])
def test_no_sequence_holds_more_than_is_counted(tokens_per_block):
    for window in (1, 2, 15, 16, 17, 40):
        for step in (2, 3, 16, 31):
            held = max(
                -(-(start + step) // tokens_per_block) - first_block(start, window, tokens_per_block)
                for start in range(200)
            )
            assert most_blocks(10_000, [window], tokens_per_block, step) == held
            assert most_blocks(5, [window, None], tokens_per_block, step) <= 2 * -(-5 // tokens_per_block)
