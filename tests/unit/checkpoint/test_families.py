"""What is a family's own, against transformers' classes, Gemma's above all, and what a family rejects."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers

from saw_trtllm.build import plan_build
from saw_trtllm.checkpoint import Checkpoint, save_checkpoint, tensorrt_llm
from saw_trtllm.checkpoint.families import FAMILIES
from saw_trtllm.checkpoint.huggingface import read_config
from saw_trtllm.errors import CheckpointError, ConfigError
from saw_trtllm.plan.options import BuildOptions
from tests.support.models import make_hf_model

PATH = Path("config.json")
GEMMA3 = {
    "architectures": ["Gemma3ForCausalLM"],
    "vocab_size": 100,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 7,
    "num_attention_heads": 4,
    "max_position_embeddings": 128,
}


def test_the_table_has_each_family_once():
    for field in ("name", "architecture"):
        assert len({getattr(family, field) for family in FAMILIES}) == len(FAMILIES)


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_the_embedding_is_scaled_as_in_the_class(tmp_path, dtype):
    """The root of 96 is rounded to the model's dtype, in bfloat16 by 0.15 %."""
    folder, model = make_hf_model(tmp_path, "gemma3", getattr(torch, dtype))
    config = Checkpoint.open(folder).config
    ids = torch.arange(203)
    scaled = model.model.embed_tokens.weight.float() * config.embedding_scale
    assert torch.equal(scaled.to(getattr(torch, dtype)), model.model.embed_tokens(ids))
    assert (config.embedding_scale == 96**0.5) is False


def test_norms_keep_what_one_plus_w_would_lose(tmp_path):
    """Rounded to bfloat16, 1 + w has 3 digits: engines keep it in float32."""
    folder, model = make_hf_model(tmp_path, "gemma2", torch.bfloat16)
    plan = plan_build(BuildOptions(model_dir=folder, backend="reference", dtype="float16"))
    norm = plan.weights.load("transformer.layers.1.pre_feedforward_layernorm.weight")
    assert norm.dtype == np.float32
    np.testing.assert_array_equal(norm, 1 + model.model.layers[1].pre_feedforward_layernorm.weight.detach().float())
    assert plan.weights.load("transformer.layers.1.mlp.fc.weight").dtype == np.float16


@pytest.mark.parametrize(
    "keys",
    [
        {},
        {"sliding_window_pattern": 3, "rope_theta": 5e5, "rope_local_base_freq": 2e4},
        {"rope_scaling": {"rope_type": "linear", "factor": 8.0}},
        {"layer_types": ["full_attention"] * 2 + ["sliding_attention"] * 5, "rope_parameters": None},
        {"rope_parameters": {"full_attention": {"rope_type": "default", "rope_theta": 4e5}, "sliding_attention": None}},
    ],
    ids=str,
)
def test_gemma_3_of_any_age_is_read_as_by_the_class(keys):
    config = read_config(GEMMA3 | keys, PATH)
    oracle = transformers.Gemma3TextConfig(**json.loads(json.dumps(GEMMA3 | keys)))
    sliding = [kind == "sliding_attention" for kind in oracle.layer_types]
    assert config.sliding_window == [oracle.sliding_window if s else None for s in sliding]
    full, local = (oracle.rope_parameters[kind] for kind in ("full_attention", "sliding_attention"))
    assert (config.rotary_base, config.rope_local_base_freq) == (full["rope_theta"], local["rope_theta"])
    assert (config.rotary_scaling or {}).get("factor") == full.get("factor")
    assert (config.head_size, config.num_key_value_heads) == (oracle.head_dim, oracle.num_key_value_heads)


@pytest.mark.parametrize(
    ("keys", "said"),
    [
        ({"hidden_activation": "gelu"}, "sets hidden_activation to 'gelu', but only 'gelu_pytorch_tanh' is supported"),
        ({"sliding_window": None}, "sets sliding_window to null, but its layer_types need one"),
        ({"sliding_window": 0}, "sets sliding_window to 0, but at least 1 is needed"),
        ({"sliding_window_pattern": 0}, "sets sliding_window_pattern to 0"),
        ({"layer_types": ["full_attention"]}, "names 1 layer_types for 7 layers"),
        ({"rope_parameters": {"rope_type": "linear", "factor": 2.0}}, "but a set for each layer type is needed"),
        ({"rope_parameters": {"full_attention": 3}}, "but a set for each layer type is needed"),
        (
            {"rope_parameters": {"sliding_attention": {"rope_type": "linear", "factor": 2.0}}},
            r"scales the RoPE of its layers with a window \(linear\), which is not supported",
        ),
        ({"use_bidirectional_attention": True}, "sets use_bidirectional_attention to True"),
        ({"query_pre_attn_scalar": 0}, "query_pre_attn_scalar"),
        ({"final_logit_softcapping": -1.0}, "final_logit_softcapping"),
    ],
    ids=str,
)
def test_what_gemma_cannot_have_is_one_sentence(keys, said):
    with pytest.raises(CheckpointError, match=said) as e:
        read_config(GEMMA3 | keys, PATH)
    assert "\n" not in str(e.value)


def test_tensorrt_llms_config_names_the_windows_in_its_own_way(tmp_path):
    """Its conversion of Gemma 3 has one window and a pattern; that of Gemma 2 says nothing of the windows."""
    save_checkpoint(Checkpoint.open(make_hf_model(tmp_path, "gemma3")[0]), tmp_path / "ours")
    ours = json.loads((tmp_path / "ours" / "config.json").read_text())
    assert ours["_sliding_window_pattern"] == 2
    config = tensorrt_llm.read_config(ours, PATH)
    assert tensorrt_llm.read_config(ours | {"sliding_window": 12}, PATH).sliding_window == config.sliding_window
    for architecture, window in (("Gemma2ForCausalLM", None), ("Gemma3ForCausalLM", None)):
        raw = ours | {"architecture": architecture, "sliding_window": window, "qk_layernorm": False}
        with pytest.raises(CheckpointError, match="does not say which layers have a sliding window"):
            tensorrt_llm.read_config(raw, PATH)
    for layers in ("three", 1 << 40):
        with pytest.raises(CheckpointError, match=r"num_hidden_layers|does not say which layers"):
            tensorrt_llm.read_config(ours | {"sliding_window": 12, "num_hidden_layers": layers}, PATH)
    irregular = config.model_copy(update={"sliding_window": [None, 12, 12]})
    with pytest.raises(ConfigError, match="the layers 0 have no sliding window"):
        tensorrt_llm.write_config(irregular, "float16", 1)


def test_other_families_configs_say_nothing_of_gemma(tmp_path):
    """TensorRT-LLM takes a config that has these keys, be it as null, for a Gemma's."""
    save_checkpoint(Checkpoint.open(make_hf_model(tmp_path, "llama")[0]), tmp_path / "ours")
    written = json.loads((tmp_path / "ours" / "config.json").read_text())
    assert not {"query_pre_attn_scalar", "final_logit_softcapping", "rope_local_base_freq"} & written.keys()
