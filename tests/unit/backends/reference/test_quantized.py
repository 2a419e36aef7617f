"""Engines of quantized models against transformers' own classes with the dequantized weights."""

import numpy as np
import pytest
import torch
from safetensors import safe_open

from saw_trtllm import LLM
from saw_trtllm.build import build, plan_build
from saw_trtllm.calibrate import calibrate
from saw_trtllm.checkpoint import Checkpoint
from saw_trtllm.checkpoint.calibration import Calibration
from saw_trtllm.engine.config import EngineConfig
from saw_trtllm.errors import ConfigError, EngineError
from saw_trtllm.model.quantization import WeightFormat, quantize
from saw_trtllm.plan.options import BuildOptions
from saw_trtllm.plan.weights import check_same_model
from tests.support.models import make_hf_model
from tests.support.quantized import CASES, fp8_channel, write_quantized
from tests.support.ranks import RankThreads
from tests.support.tolerance import EPS, model_rounding
from tests.unit.backends.reference.test_model import PROMPT, build_engine, context_logits, hf_logits
from tests.unit.backends.reference.test_tensor_parallel import CACHE, run
from tests.unit.backends.reference.test_tensor_parallel import PROMPT as SPLIT_PROMPT

QKV = "transformer.layers.0.attention.qkv.weight"


def quantized(tmp_path, family, case, **fields):
    source, model = make_hf_model(tmp_path / "source", family, num_hidden_layers=2, **fields)
    return write_quantized(tmp_path / "quantized", model, source, CASES[case]), model


def engine_logits(folder):
    llm = LLM(folder)
    try:
        return context_logits(llm, PROMPT)[0]
    finally:
        llm.shutdown()


@pytest.mark.parametrize(
    ("family", "case"),
    [("llama", "gptq desc_act"), ("qwen2", "modelopt FP8"), ("qwen3", "modelopt AWQ"), ("gemma3", "awq")],
)
def test_logits_are_those_of_the_dequantized_weights(family, case, tmp_path):
    folder, model = quantized(tmp_path, family, case)
    engine = build_engine(folder, tmp_path / "engine")
    want = hf_logits(model, PROMPT)
    np.testing.assert_allclose(engine_logits(engine), want, rtol=0, atol=model_rounding(want))


def test_an_engine_holds_the_values_and_each_parts_own_scales(tmp_path):
    folder, _ = quantized(tmp_path, "llama", "modelopt FP8")
    engine = build_engine(folder, tmp_path / "engine")
    found = EngineConfig.load(engine).saw_int4.quantized
    assert set(found) == set(Checkpoint.open(folder).formats)
    with safe_open(engine / "rank0.engine", framework="np") as file:
        values, scales = file.get_tensor(QKV), file.get_tensor(f"{QKV}.scales")
    assert values.dtype == np.uint8
    # 8 query and 2 key and value heads of 64, each projection with a scale of its own.
    assert [len(np.unique(part)) for part in np.split(scales, [512, 640])] == [1, 1, 1]
    assert len(np.unique(scales)) == 3
    options = {"model_dir": folder, "output_dir": tmp_path / "again", "dtype": "float16"}
    kinds = plan_build(BuildOptions(**options)).weights.bytes_by_kind()
    dense = plan_build(BuildOptions(**options, qformat="full_prec")).weights.bytes_by_kind()
    shapes = [Checkpoint.open(folder).shape(name) for name in found]
    values, scales = sum(out * inputs for out, inputs in shapes), sum(out for out, _ in shapes)
    inputs = len(shapes)  # a scale each
    assert kinds["FP8 by output channel"] == values + 4 * scales + 4 * inputs
    assert dense == {"float16": kinds["float16"] + 2 * values}


# -- a 16-bit model, rounded by saw-build


@pytest.mark.parametrize("qformat", ["fp8", "int4_wo"])
def test_a_16_bit_model_is_rounded_after_the_rotation_is_folded_in(qformat, tmp_path):
    folder, _ = make_hf_model(tmp_path, "llama", num_hidden_layers=2)
    plan = plan_build(BuildOptions(model_dir=folder, output_dir=tmp_path / "engine", qformat=qformat, dtype="float32"))
    assert plan.config.kv_format.rotate_v
    dense = plan_build(BuildOptions(model_dir=folder, output_dir=tmp_path / "engine", dtype="float32"))
    for name, format in plan.config.saw_int4.quantized.items():
        exact, found = dense.weights.load(name), plan.weights.load(name)
        assert found.format == format
        # Half a step: of e4m3's three bits of mantissa, or of a group's 15 steps.
        step = np.abs(exact) / 16 + found.scales * 2**-10 if qformat == "fp8" else found._spread(found.scales) / 2
        assert (np.abs(found.dequantize() - exact) <= step * (1 + 1e-3) + EPS).all()
    assert plan.config.saw_int4.quantized.keys() == {
        n for n in dense.weights.shapes if "layers" in n and "norm" not in n
    }


def test_fp8_by_channel_is_fbgemms(tmp_path):
    weight = torch.randn(48, 80, generator=torch.Generator().manual_seed(1))
    ours = quantize(weight.numpy(), WeightFormat(kind="fp8", block=(1, 80), activation="token"))
    theirs, dequantized = fp8_channel(weight)
    assert np.array_equal(ours.values.view(np.uint8), theirs["weight"].view(torch.uint8).numpy())
    np.testing.assert_array_equal(ours.dequantize(), dequantized.numpy())


@pytest.mark.parametrize("zeros", [False, True])
def test_groups_hold_their_ends_and_zero(zeros):
    weight = np.random.default_rng(0).normal(size=(6, 64)).astype(np.float32)
    weight[0] = 0
    weight[1] = np.abs(weight[1])
    weight[2, ::3] = 0
    found = quantize(weight, WeightFormat(kind="int4", block=(1, 32), zeros=zeros))
    back = found.dequantize()
    assert (back[weight == 0] == 0).all()
    assert found.values.max() == 15
    again = type(found).of_arrays(found.format, "w", weight.shape, found.arrays("w"))
    np.testing.assert_array_equal(again.dequantize(), back)


# -- levers, calibration, refit


def test_the_rotation_of_values_is_off_unless_it_is_asked_for(tmp_path):
    folder, _ = quantized(tmp_path, "llama", "gptq")
    options = {"model_dir": folder, "output_dir": tmp_path / "engine", "dtype": "float32"}
    plan = plan_build(BuildOptions(**options))
    assert not plan.config.kv_format.rotate_v
    assert len(plan.config.saw_int4.quantized) == 10
    plan = plan_build(BuildOptions(**options, rotate_v="enable"))
    assert plan.config.kv_format.rotate_v
    assert {name.split(".")[-2] for name in plan.config.saw_int4.quantized} == {"fc", "gate", "proj"}
    assert plan_build(BuildOptions(**options, qformat="full_prec")).config.saw_int4.quantized == {}


def test_a_calibration_is_of_the_quantized_weights(tmp_path):
    folder, _ = quantized(tmp_path, "llama", "gptq")
    source = tmp_path / "source" / "llama"
    windows = torch.randint(3, 203, (4, 128), generator=torch.Generator().manual_seed(2))
    path = tmp_path / "calib.safetensors"
    calibrate(Checkpoint.open(folder), windows).save(path)
    Calibration.load(path).check(Checkpoint.open(folder))
    with pytest.raises(ConfigError, match="of other weights than"):
        Calibration.load(path).check(Checkpoint.open(source))
    calibrate(Checkpoint.open(source), windows).save(path)
    with pytest.raises(ConfigError, match="of other weights than"):
        plan_build(BuildOptions(model_dir=folder, output_dir=tmp_path / "engine", calibration=path))


def test_other_weights_for_an_engine_are_quantized_alike(tmp_path):
    folder, _ = quantized(tmp_path, "llama", "gptq")
    source = Checkpoint.open(tmp_path / "source" / "llama")
    config = plan_build(BuildOptions(model_dir=folder, output_dir=tmp_path / "engine")).config
    check_same_model(Checkpoint.open(folder), config, tmp_path)
    check_same_model(source, config, tmp_path)  # rounded to the engine's format
    other, _ = quantized(tmp_path / "other", "llama", "awq")
    with pytest.raises(EngineError, match="quantized in the same way"):
        check_same_model(Checkpoint.open(other), config, tmp_path)


def test_weights_are_not_quantized_twice(tmp_path):
    folder, _ = quantized(tmp_path, "llama", "gptq")
    with pytest.raises(ConfigError, match="are quantized already: leave it out, or give --qformat full_prec"):
        plan_build(BuildOptions(model_dir=folder, output_dir=tmp_path / "engine", qformat="fp8"))


@pytest.mark.parametrize(("case", "tp_size"), [("awq", 2), ("modelopt AWQ", 4), ("fp8 blocks", 2), ("modelopt FP8", 4)])
def test_ranks_compute_what_one_does(case, tp_size, tmp_path):
    """Each has whole groups of the columns, their inputs' factors, and rows with their own scales."""
    folder, model = quantized(tmp_path, "llama", case, intermediate_size=512)
    options = {"backend": "reference", "kv": "fp16", "dtype": "float32", "gather_all_token_logits": True}
    options |= {"max_batch_size": 4, "max_seq_len": 128, "max_num_tokens": 96}
    plan = plan_build(BuildOptions(model_dir=folder, output_dir=tmp_path / "engine", tp_size=tp_size, **options))
    build(plan)
    config = EngineConfig.load(tmp_path / "engine")
    ranks = RankThreads(tmp_path / "engine", config, CACHE)
    logits = run(ranks, config, 20, 19, 1)
    ranks.shutdown()
    want = hf_logits(model, SPLIT_PROMPT)
    np.testing.assert_allclose(logits, want, rtol=0, atol=model_rounding(want))


def test_groups_stay_whole(tmp_path):
    folder, _ = quantized(tmp_path, "llama", "awq")  # 160 inner columns: 80 each
    with pytest.raises(ConfigError, match="in groups of 32, between groups"):
        build(plan_build(BuildOptions(model_dir=folder, output_dir=tmp_path / "engine", tp_size=2)))
