"""Every key of transformers' config classes: what the reader makes of it, against the classes and their models."""

from __future__ import annotations

import dataclasses
import inspect
import json
import re
from pathlib import Path

import pytest
import torch
import transformers
from transformers.modeling_rope_utils import RotaryEmbeddingConfigMixin

from saw_trtllm.checkpoint import Checkpoint, config_keys
from saw_trtllm.checkpoint.families import FAMILIES
from saw_trtllm.checkpoint.huggingface import read_config
from saw_trtllm.errors import CheckpointError
from tests.support import ROOT
from tests.support.models import make_hf_model
from tests.support.tolerance import model_rounding

CLASSES = {
    "llama": transformers.LlamaForCausalLM,
    "mistral": transformers.MistralForCausalLM,
    "qwen2": transformers.Qwen2ForCausalLM,
    "qwen3": transformers.Qwen3ForCausalLM,
    "gemma2": transformers.Gemma2ForCausalLM,
    "gemma3": transformers.Gemma3ForCausalLM,
}
FAMILY = {family.name: family for family in FAMILIES}
KEYS = {key for rules in (config_keys.COMMON, *(f.keys for f in FAMILIES)) for rule in rules for key in rule.keys}
NO_NULL = ("mistral", "gemma2", "gemma3")  # whose class takes no null there
WRONG = {"nobody": ["reads this"]}


def raw_config(family: str) -> dict:
    config = CLASSES[family].config_class(architectures=[CLASSES[family].__name__])
    return json.loads(config.to_json_string(use_diff=False))


def read(raw: dict) -> dict:
    return read_config(raw, Path("config.json")).model_dump()


def keys_of_the_class(family: str) -> set[str]:
    """Fields, what is saved, old spellings that are taken as keywords, and what the model's code reads."""
    model = CLASSES[family]
    config = model.config_class
    keys = {field.name for field in dataclasses.fields(config)} | set(config().to_dict())
    keys |= set(transformers.GenerationConfig._get_default_generation_params())
    for function in (
        transformers.PreTrainedConfig.__post_init__,
        RotaryEmbeddingConfigMixin.convert_rope_params_to_dict,
        RotaryEmbeddingConfigMixin.standardize_rope_params,
    ):
        keys |= set(re.findall(r"""(?:kwargs\.(?:pop|get)\(|attr\(self, )["'](\w+)""", inspect.getsource(function)))
    keys |= set(re.findall(r"\bconfig\.([a-z]\w*)", inspect.getsource(inspect.getmodule(model))))
    return keys


@pytest.mark.parametrize("family", CLASSES)
def test_every_key_of_the_classes_is_in_the_table(family):
    keys = keys_of_the_class(family)
    assert {"rope_theta", "rope_scaling", "torch_dtype", "per_layer_config"} <= keys
    # get_text_config and the like are methods; quantization_config comes from the code that loads weights.
    keys = {key for key in keys if not inspect.isroutine(getattr(transformers.PreTrainedConfig, key, None))}
    assert sorted(key for key in keys | {"quantization_config"} if config_keys.rule(key, FAMILY[family]) is None) == []


@pytest.mark.parametrize("family", CLASSES)
def test_a_family_has_each_key_once_and_what_is_honored_is_read(family):
    for rules in (config_keys.COMMON, FAMILY[family].keys):
        keys = [key for rule in rules for key in rule.keys]
        assert len(keys) == len(set(keys))
    own = set(keys)
    # A family's rule stands in the place of a common one as a whole, as the document's column of families says.
    assert all(own >= set(rule.keys) or not own & set(rule.keys) for rule in config_keys.COMMON)
    honored = {key for key in KEYS if config_keys.rule(key, FAMILY[family]).treatment == "honored"}
    assert honored == set(FAMILY[family].config.model_fields)


def test_the_document_has_the_table():
    text = (ROOT / "docs" / "checkpoints.md").read_text(encoding="utf-8")
    _, begin, rest = text.partition("<!-- begin keys -->\n")
    assert begin
    assert rest.partition("<!-- end keys -->")[0] == config_keys.markdown_table()


@pytest.mark.parametrize("family", CLASSES)
def test_each_key_is_treated_as_the_table_says(family):
    """Harmless: any value leaves the model as it was. Rejected: one sentence. Honored: read, so a wrong type shows."""
    raw = raw_config(family)
    expected = read(raw)
    for key in KEYS:
        rule, changed = config_keys.rule(key, FAMILY[family]), raw | {key: WRONG}
        if rule.treatment == "harmless":
            assert read(changed) == expected, key
            continue
        if key != "rope_parameters" and key != "rope_scaling":  # dicts, and keys that nobody knows are left in them
            with pytest.raises(CheckpointError) as e:
                read(changed)
            assert key in str(e.value) or key == "architectures"
            assert "\n" not in str(e.value)
        if rule.treatment == "rejected":
            for value in rule.unless:
                assert read(raw | {key: value}) == expected, key


def test_a_key_that_nobody_knows_is_a_warning(caplog):
    raw = raw_config("llama")
    assert read(raw | {"my_note": 1}) == read(raw)
    assert "config.json has keys that transformers' own class does not read either: my_note" in caplog.text


@pytest.mark.parametrize(
    ("family", "fields"),
    [
        ("mistral", {"attention_bias": True}),
        ("qwen2", {"attention_bias": True}),
        ("mistral", {"mlp_bias": True}),
        ("llama", {"hidden_act": "swish"}),
        ("llama", {"sliding_window": -1}),
        ("qwen2", {"use_sliding_window": False, "sliding_window": 0}),
        ("qwen3", {"use_sliding_window": False, "sliding_window": -1}),
    ],
    ids=str,
)
def test_what_a_class_ignores_leaves_its_model_as_it_is(tmp_path, family, fields):
    """The class itself is the oracle: with the key and without it its models have the same weights and logits."""
    plain, ours = make_hf_model(tmp_path / "plain", family, num_hidden_layers=1)
    folder, _ = make_hf_model(tmp_path / "changed", family, num_hidden_layers=1)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | fields))
    changed = CLASSES[family].from_pretrained(folder)
    ids = torch.arange(3, 43)[None]
    with torch.inference_mode():
        expected = ours(ids).logits
        torch.testing.assert_close(changed(ids).logits, expected, rtol=0, atol=model_rounding(expected))
    assert Checkpoint.open(folder).config == Checkpoint.open(plain).config


@pytest.mark.parametrize("family", CLASSES)
def test_left_out_heads_are_those_of_the_class(family):
    """Null is one thing, and a key that is left out another: Qwen2's class then has 32 KV heads."""
    raw = raw_config(family) | {"num_attention_heads": 64, "head_dim": 64}
    for change in ({"num_key_value_heads": None}, {})[family in NO_NULL :]:
        config = {k: v for k, v in raw.items() if k != "num_key_value_heads"} | change
        oracle = CLASSES[family].config_class(**config)
        assert read(config)["num_key_value_heads"] == oracle.num_key_value_heads
