"""Quantized checkpoints: each dialect's weights are those that its own library computes with."""

from __future__ import annotations

import inspect
import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from saw_trtllm.checkpoint import Checkpoint, save_checkpoint
from saw_trtllm.checkpoint.quantization import DIALECTS, TENSORRT_LLM, markdown_tables
from saw_trtllm.errors import CheckpointError, ConfigError
from tests.support.models import make_hf_model
from tests.support.quantized import (
    CASES,
    PRESETS,
    Case,
    compressed_tensors,
    fp8_channel,
    fp8_tensor,
    gptq,
    write_quantized,
)
from tests.unit.checkpoint.test_checkpoint import hugging_face_tensors

#: Sizes that groups of 32 divide and blocks of 128 do not.
SIZES = {"num_hidden_layers": 1, "head_dim": 64, "num_attention_heads": 4}
#: Which TensorRT-LLM's INT4 layers take, and of which two ranks have whole groups.
CONVERTED = SIZES | {"hidden_size": 128, "intermediate_size": 256}


def case_of(name: str) -> Case:
    if name in CASES:
        return CASES[name]
    pytest.importorskip("compressed_tensors", reason="compressed-tensors is not installed")
    return compressed_tensors(*PRESETS[name])


def quantized_model(tmp_path, case, lift=False, sizes=SIZES, family="llama", **options):
    """A folder and its oracle; ``lift`` gives one layer weights above 0 alone."""
    source, model = make_hf_model(tmp_path / "source", family, **sizes)
    if lift:
        with torch.no_grad():
            model.model.layers[0].mlp.gate_proj.weight.abs_()
    return write_quantized(tmp_path / "quantized", model, source, case, **options), model


@pytest.mark.parametrize("name", [*CASES, *PRESETS])
def test_weights_are_the_librarys_to_the_last_bit(name, tmp_path):
    case = case_of(name)
    folder, model = quantized_model(tmp_path, case)
    ckpt = Checkpoint.open(folder)
    assert len(ckpt.formats) == 5
    for tensor, want in hugging_face_tensors(model).items():
        np.testing.assert_array_equal(ckpt.load_finite(tensor), want.detach().numpy(), err_msg=tensor)
    for format in ckpt.formats.values():
        assert format.model_dump() == format.model_dump() | case.formats


def test_transformers_own_reader_finds_the_same_blocks(tmp_path):
    """Without a GPU it dequantizes what it loads; it takes blocks to be smaller where 128 does not divide a size."""
    sizes = SIZES | {"hidden_size": 128, "intermediate_size": 256}
    source, model = make_hf_model(tmp_path / "source", "llama", **sizes)
    ckpt = Checkpoint.open(write_quantized(tmp_path / "quantized", model, source, CASES["fp8 blocks"]))
    loaded = AutoModelForCausalLM.from_pretrained(ckpt.folder, dtype=torch.float32)
    for tensor, want in hugging_face_tensors(loaded).items():
        np.testing.assert_array_equal(ckpt.load(tensor), want.detach().numpy(), err_msg=tensor)


def test_a_zero_point_of_0_borrows_from_its_neighbor(tmp_path):
    """What version 1 subtracts from whole words reaches into other zero points, and comes back."""
    folder, model = quantized_model(tmp_path, CASES["gptq zeros"], lift=True)
    ckpt = Checkpoint.open(folder)
    name = "transformer.layers.0.mlp.fc.weight"
    assert (ckpt.load_quantized(name).zeros == 0).any()
    np.testing.assert_array_equal(ckpt.load(name), model.model.layers[0].mlp.gate_proj.weight.detach().numpy())


def test_layers_that_are_left_out_stay_as_they_are(tmp_path):
    case = CASES["gptq"]
    folder, model = quantized_model(tmp_path, case, ignore=("down_proj",))
    ckpt = Checkpoint.open(folder)
    assert "transformer.layers.0.mlp.proj.weight" not in ckpt.formats
    np.testing.assert_array_equal(
        ckpt.load("transformer.layers.0.mlp.proj.weight"), model.model.layers[0].mlp.down_proj.weight.detach().numpy()
    )


def test_model_optimizers_blocks_may_have_four_axes(tmp_path):
    """It writes the scales of FP8_PB_WO as ``[rows, 1, columns, 1]`` too."""
    folder, _ = quantized_model(tmp_path, CASES["modelopt FP8 blocks"])
    before = Checkpoint.open(folder)
    want = {name: before.load(name) for name in before.formats}
    tensors = load_file(folder / "model.safetensors")
    tensors |= {n: x[:, None, :, None].contiguous() for n, x in tensors.items() if n.endswith("weight_scale")}
    save_file(tensors, folder / "model.safetensors")
    after = Checkpoint.open(folder)
    for name, weight in want.items():
        np.testing.assert_array_equal(after.load(name), weight, err_msg=name)


def test_one_group_has_no_order(tmp_path):
    """``desc_act`` with a scale for a whole row: TensorRT's engines take it."""
    case = Case(gptq(-1, desc_act=True), CASES["gptq -1"].config | {"desc_act": True})
    folder, model = quantized_model(tmp_path, case)
    ckpt = Checkpoint.open(folder)
    assert not any(format.act_order for format in ckpt.formats.values())
    for tensor, want in hugging_face_tensors(model).items():
        np.testing.assert_array_equal(ckpt.load(tensor), want.detach().numpy(), err_msg=tensor)


# -- settings


def test_a_pattern_that_is_none_is_one_sentence(tmp_path):
    source, _ = make_hf_model(tmp_path, "llama", **SIZES)
    group = {"targets": ["re:("], "weights": {"num_bits": 4}}
    section = {"quant_method": "compressed-tensors", "config_groups": {"group_0": group}}
    edit(source, lambda config: config.update(quantization_config=section))
    with pytest.raises(CheckpointError, match=r"targets: 're:\(' is no pattern \(.*\): use the weights'") as e:
        Checkpoint.open(source)
    assert "\n" not in str(e.value)


def test_groups_of_compressed_tensors_are_found_by_name(tmp_path):
    pytest.importorskip("compressed_tensors", reason="compressed-tensors is not installed")
    four, eight = (compressed_tensors(*PRESETS[name]) for name in ("W4A16", "FP8 by channel"))
    source, model = make_hf_model(tmp_path / "source", "llama", **SIZES)
    folder = write_quantized(tmp_path / "four", model, source, four)
    other = write_quantized(tmp_path / "eight", model, source, eight)
    tensors, floats = load_file(folder / "model.safetensors"), load_file(other / "model.safetensors")
    tensors = {n: x for n, x in tensors.items() if "mlp" not in n} | {n: x for n, x in floats.items() if "mlp" in n}
    save_file(tensors, folder / "model.safetensors")
    groups = [case.config["config_groups"]["group_0"] for case in (four, eight)]
    groups[1] = groups[1] | {"format": "float-quantized"}
    mlp = [f"model.layers.0.mlp.{n}_proj" for n in ("gate", "up", "down")]
    # The library takes the closest target, wherever its group stands: a name, then a pattern, then the class.
    for of_int4, of_fp8 in (
        (["re:.*self_attn.*"], ["Linear"]),
        (["Linear"], [r"re:.*mlp\.(gate|up|down)_proj$"]),
        (["Linear", "re:.*"], mlp),
    ):
        groups[0]["targets"], groups[1]["targets"] = of_int4, of_fp8
        named = dict(zip("ab", groups, strict=True))
        edit(folder, lambda config, named=named: config["quantization_config"].update(config_groups=named))
        formats = Checkpoint.open(folder).formats
        kinds = [formats[f"transformer.layers.0.{n}.weight"].kind for n in ("attention.qkv", "mlp.fc")]
        assert kinds == ["int4", "fp8"]


def edit(folder, change, file="config.json"):
    config = json.loads((folder / file).read_text())
    change(config)
    (folder / file).write_text(json.dumps(config))


#: What transformers' classes take, beside what published configs have.
KNOWN = {
    "gptq": [transformers.GPTQConfig],
    "awq": [transformers.AwqConfig, transformers.GPTQConfig],
    "fbgemm_fp8": [transformers.FbgemmFp8Config],
    "fp8": [transformers.FineGrainedFP8Config],
    "compressed-tensors": [transformers.CompressedTensorsConfig],
}


@pytest.mark.parametrize("dialect", DIALECTS, ids=lambda d: d.name)
def test_every_key_that_a_library_writes_is_in_the_table(dialect):
    keys = {"quant_method"} if dialect.name in KNOWN else set()
    for config in KNOWN.get(dialect.name, ()):
        keys |= set(inspect.signature(config.__init__).parameters) - {"self", "kwargs"}
    for case in CASES.values():
        if case.config.get("quant_method", "modelopt" if "producer" in case.config else None) == dialect.name:
            keys |= set(case.config) | set(case.config.get("quantization", ()))
    assert sorted(key for key in keys if dialect.rule(key) is None) == []
    known = [key for rule in dialect.keys for key in rule.keys]
    assert len(known) == len(set(known))


def test_every_key_of_compressed_tensors_own_classes_is_in_the_table():
    quantization = pytest.importorskip("compressed_tensors.quantization", reason="compressed-tensors is not installed")
    dialect = next(d for d in DIALECTS if d.name == "compressed-tensors")
    group, arguments = dialect.sections.values()
    for model, rules in (
        (quantization.QuantizationConfig, dialect.keys),
        (quantization.QuantizationScheme, group),
        (quantization.QuantizationArgs, arguments),
    ):
        assert set(model.model_fields) <= {key for rule in rules for key in rule.keys}


def test_every_key_of_tensorrt_llms_section_is_in_the_table():
    keys = "quant_algo kv_cache_quant_algo group_size smoothquant_val clamp_val use_meta_recipe has_zero_point "
    keys += "pre_quant_scale exclude_modules mamba_ssm_cache_dtype quantized_layers"
    assert [key for key in keys.split() if TENSORRT_LLM.rule(key) is None] == []


def test_the_document_has_the_tables():
    text = (Path(__file__).parents[3] / "docs" / "weights.md").read_text(encoding="utf-8")
    _, begin, rest = text.partition("<!-- begin keys -->\n")
    assert begin
    assert rest.partition("<!-- end keys -->")[0] == markdown_tables()


def test_a_key_that_nobody_knows_is_a_warning(tmp_path, caplog):
    folder, _ = quantized_model(tmp_path, CASES["gptq"])
    edit(folder, lambda config: config["quantization_config"].update(my_note=1))
    Checkpoint.open(folder)
    assert "has keys of its gptq weights that nobody knows here: my_note" in caplog.text


# -- bad input


def damaged(case, tensors=None, drop=(), **settings):
    """A case, with tensors of a layer changed or taken out, and settings changed."""
    return case, tensors or {}, drop, settings


FC, QKV = "model.layers.0.mlp.gate_proj.", "model.layers.0.self_attn.k_proj."
BAD = {
    "bits": (damaged("gptq", bits=3), "bits: Input should be 4 or 8, and 3 was given"),
    "group": (damaged("gptq", group_size=36), "groups of 36, which do not divide the 96 inputs of"),
    "layout": (damaged("awq", version="gemv"), "version: Input should be 'gemm', and 'gemv' was given"),
    "marlin": (damaged("gptq", is_marlin_format=True), "weights laid out for another kernel"),
    "layers of their own": (damaged("gptq", dynamic={"+:.*k_proj.*": {"bits": 8}}), "settings of their own (dynamic)"),
    "order": (
        damaged("gptq", drop=("g_idx",), desc_act=True),
        "lacks the tensor 'model.layers.0.self_attn.q_proj.g_idx'",
    ),
    "an order that is not said": (damaged("gptq desc_act", desc_act=False), "where the config says desc_act false"),
    "zero points": (damaged("gptq zeros", sym=True), "has zero points other than 8"),
    "shape": (damaged("gptq", {"scales": lambda x: x[:, :-1]}), "has shape [3, 159], but [3, 160] is what"),
    "dtype": (damaged("gptq", {"scales": lambda x: x.int()}), "stored as I32, but its quantization needs float16"),
    "NaN": (damaged("gptq", {"scales": lambda x: x * torch.nan}), "has a scale of nan, but scales are above 0"),
    "zero": (damaged("fbgemm_fp8", {"weight_scale": torch.zeros_like}), "has a scale of 0, but scales are above 0"),
    "negative": (damaged("fp8 blocks", {"weight_scale_inv": torch.neg}), "but scales are above 0 and finite"),
    "NaN among values": (
        damaged("fbgemm_fp8", {"weight": lambda x: (x.float() * torch.nan).to(x.dtype)}),
        "holds NaN or infinity",
    ),
    "missing": (damaged("awq", drop=("qzeros",)), "lacks the tensor"),
    "no scale of inputs": (damaged("modelopt FP8", drop=("input_scale",)), "lacks the tensor"),
    "another dialect's tensor": (
        damaged("gptq", {"weight_packed": lambda x: torch.zeros(4)}),
        "belongs to quantized weights, and the config names others or none",
    ),
    "method": (damaged("gptq", quant_method="hqq"), "'hqq', which is not supported: use a model quantized in one of"),
}


def load_all(folder):
    ckpt = Checkpoint.open(folder)
    for tensor in ckpt.names():
        ckpt.load_finite(tensor)


@pytest.mark.parametrize("name", BAD)
def test_bad_input_is_one_sentence(name, tmp_path):
    (case, tensors, drop, settings), words = BAD[name]
    folder, _ = quantized_model(tmp_path, CASES[case])
    path = folder / "model.safetensors"
    stored = {n: x for n, x in load_file(path).items() if not n.endswith(drop or ("!",))}
    for suffix, change in tensors.items():
        stored[FC + suffix] = change(stored.get(FC + suffix)).contiguous()
    save_file(stored, path)
    edit(folder, lambda config: config.get("quantization_config", {}).update(settings))
    with pytest.raises(CheckpointError) as e:
        load_all(folder)
    assert words in str(e.value)
    assert "\n" not in str(e.value)


@pytest.mark.parametrize(
    "name", ["awq", "gptq desc_act", "fp8 blocks", "modelopt AWQ", "W4A16 with zero points", "FP8 by block"]
)
def test_any_value_of_any_setting_is_taken_or_rejected_in_one_sentence(name, tmp_path):
    case = case_of(name)
    folder, _ = quantized_model(tmp_path, case)
    original = json.loads((folder / case.file).read_text())
    settings = original if case.file != "config.json" else original["quantization_config"]
    for place in places(settings):
        for key, value in list(place.items()):
            for odd in (None, -1, 0, 1.5, "x", [], [0, 128], {}, {"a": 1}, {"a": []}, True):
                place[key] = odd
                (folder / case.file).write_text(json.dumps(original))
                try:
                    message = str(Checkpoint.open(folder).formats)
                except CheckpointError as e:
                    message = str(e)
                assert "\n" not in message
            place[key] = value


def places(settings):
    """A JSON object and those in it."""
    yield settings
    for value in list(settings.values()):
        if isinstance(value, dict):
            yield from places(value)


def test_queries_keys_and_values_are_quantized_alike(tmp_path):
    folder, _ = quantized_model(tmp_path, CASES["gptq"], ignore=("k_proj",))
    with pytest.raises(CheckpointError, match=r"self_attn\.q_proj' quantized and .*self_attn\.k_proj' not"):
        Checkpoint.open(folder)


def test_two_dialects_in_a_folder(tmp_path):
    folder, _ = quantized_model(tmp_path, CASES["gptq"])
    (folder / "hf_quant_config.json").write_text(json.dumps(CASES["modelopt FP8"].config))
    with pytest.raises(CheckpointError, match=r"by 'gptq' and .*hf_quant_config.json by 'modelopt'"):
        Checkpoint.open(folder)


def test_settings_without_quantized_weights(tmp_path):
    folder, _ = make_hf_model(tmp_path, "llama", **SIZES)
    edit(folder, lambda config: config.update(quantization_config=CASES["awq"].config))
    with pytest.raises(CheckpointError, match="quantized by 'awq' and holds no such weight"):
        Checkpoint.open(folder)


# -- TensorRT-LLM's checkpoints


@pytest.mark.parametrize("tp_size", [1, 2])
@pytest.mark.parametrize(
    ("name", "algorithm"),
    [
        ("gptq", "W4A16_AWQ"),
        ("awq", "W4A16_AWQ"),
        ("gptq zeros", "W4A16_AWQ"),
        ("modelopt AWQ", "W4A16_AWQ"),
        ("fbgemm_fp8", "FP8_PER_CHANNEL_PER_TOKEN"),
        ("modelopt FP8", "FP8"),
    ],
)
def test_a_checkpoint_of_tensorrt_llm_has_the_same_weights(name, algorithm, tp_size, tmp_path):
    source, model = make_hf_model(tmp_path / "source", "llama", torch.float16, **CONVERTED)
    model = model.float()
    ckpt = Checkpoint.open(write_quantized(tmp_path / "quantized", model, source, CASES[name]))
    save_checkpoint(ckpt, tmp_path / "ckpt", tp_size)
    again = Checkpoint.open(tmp_path / "ckpt")
    assert json.loads((tmp_path / "ckpt" / "config.json").read_text())["quantization"]["quant_algo"] == algorithm
    for tensor in ckpt.names():
        want = ckpt.load_finite(tensor)
        if algorithm == "FP8" and "qkv" in tensor:
            # Its layer has one scale for all three.
            weight = ckpt.load_quantized(tensor)
            scale = weight.scales.max()
            want = (want / scale).astype(weight.values.dtype).astype(np.float32) * scale
        np.testing.assert_array_equal(again.load_finite(tensor), want, err_msg=tensor)
    assert {n: f.model_copy(update={"scale_dtype": "float32"}) for n, f in again.formats.items()} == {
        n: f.model_copy(update={"scale_dtype": "float32"}) for n, f in ckpt.formats.items()
    }


def test_tensorrt_llm_packs_as_model_optimizer_does(tmp_path):
    source, model = make_hf_model(tmp_path / "source", "llama", **CONVERTED)
    folder = write_quantized(tmp_path / "quantized", model, source, CASES["modelopt AWQ"])
    save_checkpoint(Checkpoint.open(folder), tmp_path / "ckpt")
    theirs, ours = load_file(folder / "model.safetensors"), load_file(tmp_path / "ckpt" / "rank0.safetensors")
    for suffix, name in (("weight", "weight"), ("weight_scale", "weights_scaling_factor")):
        want, got = theirs[f"{FC}{suffix}"], ours[f"transformer.layers.0.mlp.fc.{name}"]
        assert torch.equal(got.view(want.dtype), want)
    section = json.loads((tmp_path / "ckpt" / "config.json").read_text())["quantization"]
    assert section["exclude_modules"] == ["lm_head"]
    assert (section["group_size"], section["has_zero_point"], section["pre_quant_scale"]) == (32, False, True)


@pytest.mark.parametrize(
    ("name", "ignored", "excluded"),
    [
        ("gptq", ("down_proj", "o_proj"), ("attention.dense", "mlp.proj")),
        ("modelopt FP8", ("down_proj", "o_proj"), ("attention.dense", "mlp.proj")),
        ("fbgemm_fp8", ("q_proj", "k_proj", "v_proj", "o_proj"), ("attention", "input_layernorm")),
        ("fbgemm_fp8", ("gate_proj", "up_proj", "down_proj"), ("mlp", "post_layernorm")),
    ],
)
def test_layers_in_16_bits_are_excluded_in_tensorrt_llms_checkpoint(name, ignored, excluded, tmp_path):
    """Its loader takes every linear layer to be quantized that is not named."""
    folder, _ = quantized_model(tmp_path, CASES[name], sizes=CONVERTED, ignore=ignored)
    save_checkpoint(Checkpoint.open(folder), tmp_path / "ckpt")
    section = json.loads((tmp_path / "ckpt" / "config.json").read_text())["quantization"]
    assert section["exclude_modules"] == [f"transformer.layers.0.{module}" for module in excluded] + ["lm_head"]


def test_fp8_of_tensorrt_llm_by_tensor(tmp_path):
    """As its own quantize.py writes it: one scale for a weight and one for its input."""
    source, _ = make_hf_model(tmp_path / "source", "llama", **SIZES)
    save_checkpoint(Checkpoint.open(source), tmp_path / "ckpt")
    path = tmp_path / "ckpt" / "rank0.safetensors"
    tensors, want = load_file(path), {}
    for name in [n for n in tensors if n.startswith("transformer.layers") and "layernorm" not in n]:
        stored, want[name] = fp8_tensor("weights_scaling_factor", "activation_scaling_factor")(tensors[name])
        tensors |= {
            name.removesuffix("weight") + suffix: x.reshape(-1) if x.ndim < 2 else x for suffix, x in stored.items()
        }
    tensors["transformer.layers.0.attention.kv_cache_scaling_factor"] = torch.ones(1)
    save_file(tensors, path)
    edit(
        tmp_path / "ckpt",
        lambda config: config.update(quantization={"quant_algo": "FP8", "kv_cache_quant_algo": "FP8"}),
    )
    ckpt = Checkpoint.open(tmp_path / "ckpt")
    assert len(want) == len(ckpt.formats) == 5
    for name, weight in want.items():
        np.testing.assert_array_equal(ckpt.load(name), weight.numpy(), err_msg=name)


@pytest.mark.parametrize(
    ("name", "tp_size", "words", "options"),
    [
        ("awq -1", 1, "INT4 weights in groups of several sizes", {}),
        ("gptq desc_act", 1, "INT4 weights with an order of columns", {}),
        ("gptq 8 bits", 1, "INT8 weights", {}),
        ("fp8 blocks", 1, "FP8 weights in blocks", {}),
        ("gptq", 1, r"of the shape [512, 96] in INT4, and TensorRT-LLM takes multiples of 64", {}),
        ("gptq", 4, "multiples of 256", {"sizes": CONVERTED}),
        ("gptq", 2, "in groups of 32, between groups", {"sizes": CONVERTED | {"intermediate_size": 160}}),
        ("fbgemm_fp8", 1, "in a part of transformer.layers.0.attention", {"ignore": ("o_proj",)}),
        ("fbgemm_fp8", 1, "a norm of queries and keys and FP8 weights by output channel", {"family": "qwen3"}),
        ("fbgemm_fp8", 1, "norms after attention and MLP and FP8 weights", {"family": "gemma2"}),
        ("static", 1, "FP8 weights by output channel and stored scales of inputs", {}),
    ],
)
def test_what_tensorrt_llm_has_no_checkpoint_of(name, tp_size, words, options, tmp_path):
    static = replace(CASES["modelopt FP8"], write=fp8_channel_static)
    folder, _ = quantized_model(tmp_path, static if name == "static" else CASES[name], **options)
    with pytest.raises(ConfigError) as e:
        save_checkpoint(Checkpoint.open(folder), tmp_path / "ckpt", tp_size)
    assert words in str(e.value)
    assert str(e.value).count(": ") <= 2
    assert not (tmp_path / "ckpt" / "config.json").exists()


def fp8_channel_static(weight):
    tensors, meant = fp8_channel(weight)
    return tensors | {"input_scale": torch.tensor(0.02)}, meant


def test_zero_points_that_do_not_belong_to_the_scales(tmp_path):
    folder, _ = quantized_model(tmp_path, CASES["awq"], sizes=CONVERTED)
    save_checkpoint(Checkpoint.open(folder), tmp_path / "ckpt")
    tensors = load_file(tmp_path / "ckpt" / "rank0.safetensors")
    tensors[FC.replace("model", "transformer").replace("mlp.gate_proj.", "mlp.fc.") + "zero"] += 0.4
    save_file(tensors, tmp_path / "ckpt" / "rank0.safetensors")
    with pytest.raises(CheckpointError, match=r"mlp.fc.zero' has what is no multiple of the weight's scales"):
        Checkpoint.open(tmp_path / "ckpt").load_quantized("transformer.layers.0.mlp.fc.weight")
