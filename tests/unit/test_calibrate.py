"""Centers and smoothing of keys: exact without quantization, measured rightly, refused where they do not belong."""

import argparse
import json
import shutil

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file, save_file
from safetensors.torch import load_file as load_torch
from safetensors.torch import save_file as save_torch

from saw_trtllm import LLM, SamplingParams
from saw_trtllm.backends.reference.window import WindowModel
from saw_trtllm.build import build, plan_build
from saw_trtllm.calibrate import calibrate
from saw_trtllm.checkpoint import Checkpoint, save_checkpoint
from saw_trtllm.checkpoint.calibration import Calibration
from saw_trtllm.cli import build as saw_build
from saw_trtllm.cli import calibrate as saw_calibrate
from saw_trtllm.engine.config import EngineConfig
from saw_trtllm.errors import ConfigError
from saw_trtllm.eval.outliers import PlantedCheckpoint, plant_key_bias
from saw_trtllm.model.fold import fold_smoothing
from saw_trtllm.plan.options import BuildOptions
from tests.support.eval_text import calibration_ids
from tests.support.example import EXAMPLE
from tests.support.models import make_hf_model
from tests.support.rejection import refused
from tests.support.tolerance import model_rounding

FAMILIES = ("llama", "mistral", "qwen2", "qwen3")
RNG = np.random.default_rng(5)
PROMPT = RNG.integers(3, 203, 70).tolist()
WINDOWS = torch.from_numpy(RNG.integers(3, 203, (3, 120)))


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """A random model of each family, in fp32."""
    return {family: make_hf_model(tmp_path_factory.mktemp(family), family)[0] for family in FAMILIES}


@pytest.fixture(scope="module")
def calibrations(folders):
    """Of each family's model."""
    return {family: calibrate(Checkpoint.open(folder), WINDOWS) for family, folder in folders.items()}


def make_engine(model_dir, output_dir, **options):
    defaults = {"kv": "fp16", "dtype": "float32", "max_batch_size": 16, "max_num_tokens": 512, "tokens_per_block": 16}
    options = defaults | {"gather_all_token_logits": True} | options
    build(plan_build(BuildOptions(model_dir=model_dir, output_dir=output_dir, **options)))
    return output_dir


def all_logits(engine, chunk=16, prompt=PROMPT, generated=8):
    """Of the prompt, computed in chunks, and of the text behind it, decoded: and that text."""
    with LLM(engine, prefill_chunk=chunk) as llm:
        params = SamplingParams(
            max_tokens=generated, ignore_eos=True, return_context_logits=True, return_generation_logits=True
        )
        answer = llm.generate(prompt, params)
    output = answer.outputs[0]
    return np.concatenate([answer.context_logits, output.generation_logits]), output.token_ids


def scaled(checkpoint, smoothing):
    config = checkpoint.config
    return PlantedCheckpoint(checkpoint, config, lambda name, x: fold_smoothing(name, x, config, smoothing))


def model_logits(checkpoint):
    model = WindowModel(checkpoint.config, checkpoint.load, WINDOWS.shape[1])
    return model.logits(model.hidden(WINDOWS))


# -- exact without quantization


@pytest.mark.parametrize("family", FAMILIES)
def test_a_calibrated_engine_computes_what_the_plain_one_does(family, folders, calibrations, tmp_path):
    """Through chunks whose history is in the cache and whose own keys are not, and through decodes."""
    file = tmp_path / "calib.safetensors"
    calibrations[family].save(file)
    expected, text = all_logits(make_engine(folders[family], tmp_path / "plain"))
    got, same_text = all_logits(make_engine(folders[family], tmp_path / "calibrated", calibration=file))
    assert np.abs(expected).max() > 1
    assert np.abs(calibrations[family].k_center).max() > 0.1
    assert calibrations[family].smoothing.std() > 0.02
    assert same_text == text
    np.testing.assert_allclose(got, expected, rtol=0, atol=model_rounding(expected))


def test_any_center_is_exact(folders, calibrations, tmp_path):
    """A vector of dozens that has nothing to do with the keys: the chunk's own must be centred as the history is."""
    plain = calibrations["qwen2"].without_smoothing()
    center = np.random.default_rng(0).normal(0, 20, plain.k_center.shape).astype(np.float32)
    odd = Calibration(center, plain.smoothing, plain.shape, plain.probe, plain.num_tokens)
    odd.save(tmp_path / "odd.safetensors")
    expected, _ = all_logits(make_engine(folders["qwen2"], tmp_path / "plain"))
    got, _ = all_logits(make_engine(folders["qwen2"], tmp_path / "odd", calibration=tmp_path / "odd.safetensors"))
    np.testing.assert_allclose(got, expected, atol=5e-4)  # scores of thousands have their rounding


@pytest.mark.parametrize("family", FAMILIES)
def test_any_smoothing_is_exact(family, folders):
    checkpoint = Checkpoint.open(folders[family])
    factors = np.exp(np.random.default_rng(1).normal(0, 1.5, (3, 2, 32))).astype(np.float32)
    if family == "qwen3":
        factors[:] = factors[:, :1]
    expected = model_logits(checkpoint)
    torch.testing.assert_close(
        model_logits(scaled(checkpoint, factors)), expected, atol=model_rounding(expected), rtol=0
    )
    one_channel = factors.copy()
    one_channel[:, :, ::2] = 1
    changed = {
        name.split(".", 3)[3]
        for name in checkpoint.names()
        if not np.array_equal(scaled(checkpoint, one_channel).load(name), checkpoint.load(name))
    }
    biased = {"attention.qkv.weight", "attention.qkv.bias"}
    normed = {"attention.q_layernorm.weight", "attention.k_layernorm.weight"}
    assert changed == {"qwen2": biased, "qwen3": normed}.get(family, {"attention.qkv.weight"})


def test_heads_that_share_a_norm_share_their_factors(folders, calibrations):
    checkpoint = Checkpoint.open(folders["qwen3"])
    smoothing = calibrations["qwen3"].smoothing
    assert (smoothing == smoothing[:, :1]).all()
    apart = smoothing.copy()
    apart[1, 1, 3] *= 2
    with pytest.raises(ConfigError, match="layer 1 differs from head to head"):
        scaled(checkpoint, apart).load("transformer.layers.1.attention.q_layernorm.weight")


def test_a_calibrated_cache_withstands_a_key_bias(folders, tmp_path):
    """End to end with 4-bit rows, in chunks and decodes: the bias drowns the keys unless all of them are centred."""
    planted = plant_key_bias(Checkpoint.open(folders["qwen2"]), magnitude=60.0)
    save_checkpoint(planted, tmp_path / "planted", dtype="float32")
    model = {"model_dir": None, "checkpoint_dir": tmp_path / "planted"}
    calibrate(Checkpoint.open(tmp_path / "planted"), WINDOWS).save(tmp_path / "c")
    exact, _ = all_logits(make_engine(output_dir=tmp_path / "exact", **model))
    plain, _ = all_logits(make_engine(output_dir=tmp_path / "plain", kv="saw_int4", **model), generated=1)
    calibrated = make_engine(output_dir=tmp_path / "calibrated", kv="saw_int4", calibration=tmp_path / "c", **model)
    got, _ = all_logits(calibrated, generated=1)
    prompt = slice(16, len(PROMPT))  # what has a history

    def error(logits):
        return np.sqrt(np.mean((logits[prompt] - exact[prompt]) ** 2))

    assert error(got) < error(plain) / 4
    section = EngineConfig.load(calibrated).saw_int4
    assert section.k_center
    name = "transformer.layers.2.attention.k_center"
    np.testing.assert_array_equal(
        load_file(calibrated / "rank0.engine")[name], Calibration.load(tmp_path / "c").k_center[2]
    )


# -- what is measured


@pytest.mark.parametrize("family", FAMILIES)
def test_moments_are_those_of_the_text(family, folders, calibrations):
    """Against NumPy on all keys and queries at once."""
    checkpoint, calibration = Checkpoint.open(folders[family]), calibrations[family]
    model, seen = WindowModel(checkpoint.config, checkpoint.load, 120), {0: [], 1: [], 2: []}
    for window in WINDOWS:
        model.hidden(window[None], observe=lambda layer, a: seen[layer].append((a.q.numpy(), a.k.numpy())))
    for layer, parts in seen.items():
        q, k = (np.concatenate([p[i] for p in parts]).astype(np.float64) for i in range(2))
        both = np.tile(calibration.smoothing[layer], 2)
        np.testing.assert_allclose(calibration.k_center[layer] * both, k.mean(0), atol=1e-5)
        rms_k = np.sqrt((k - k.mean(0)).reshape(-1, 2, 2, 32).__pow__(2).mean((0, 2)))
        rms_q = np.sqrt((q**2).reshape(-1, 2, 4, 2, 32).mean((0, 2, 3)))
        if family == "qwen3":
            rms_k, rms_q = (np.sqrt((x**2).mean(0, keepdims=True)) for x in (rms_k, rms_q))
        factors = np.sqrt(rms_k / rms_q)
        factors /= np.exp(np.log(factors).mean(-1, keepdims=True))
        np.testing.assert_allclose(calibration.smoothing[layer], np.broadcast_to(factors, (2, 32)), rtol=1e-4)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_smoothed_model_needs_no_more_smoothing(family, folders, calibrations):
    """And its centers are the ones that were written down."""
    smoothed = scaled(Checkpoint.open(folders[family]), calibrations[family].smoothing)
    again = calibrate(smoothed, WINDOWS)
    np.testing.assert_allclose(again.smoothing, 1, rtol=1e-4)
    np.testing.assert_allclose(again.k_center, calibrations[family].k_center, atol=1e-4)


def test_levers_come_apart(calibrations):
    both = calibrations["llama"]
    assert not both.without_centring().k_center.any()
    alone = both.without_smoothing()
    assert (alone.smoothing == 1).all()
    np.testing.assert_allclose(alone.k_center, both.k_center * np.concatenate([both.smoothing] * 2, -1), rtol=1e-6)


def test_pairs_that_nothing_asks_for_have_finite_factors(folders):
    checkpoint = Checkpoint.open(folders["llama"])

    def edit(name, tensor):
        if name.endswith("qkv.weight"):
            tensor = tensor.copy()
            tensor[: 8 * 64].reshape(8, 2, 32, -1)[:, :, 5] = 0  # queries of pair 5
            tensor[8 * 64 : 10 * 64].reshape(2, 2, 32, -1)[:, :, 6] = 0  # keys of pair 6
        return tensor

    dead = PlantedCheckpoint(checkpoint, checkpoint.config, edit)
    calibration = calibrate(dead, WINDOWS)
    assert 1e-3 < calibration.smoothing.min() < calibration.smoothing.max() < 1e3
    expected = model_logits(dead)
    got = model_logits(scaled(dead, calibration.smoothing))
    torch.testing.assert_close(got, expected, atol=model_rounding(expected), rtol=0)


# -- the file


def test_a_file_gives_back_what_was_saved(calibrations, tmp_path):
    saved = calibrations["qwen2"]
    saved.save(tmp_path / "c.safetensors")
    loaded = Calibration.load(tmp_path / "c.safetensors")
    np.testing.assert_array_equal(loaded.k_center, saved.k_center)
    np.testing.assert_array_equal(loaded.smoothing, saved.smoothing)
    assert (loaded.shape, loaded.num_tokens, loaded.describe()) == (saved.shape, 360, saved.describe())
    assert [p.name for p in tmp_path.iterdir()] == ["c.safetensors"]


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_other_dtypes_and_splits_of_a_model_are_the_same_model(dtype, folders, calibrations, tmp_path):
    for family in FAMILIES:
        save_checkpoint(Checkpoint.open(folders[family]), tmp_path / family, tp_size=2, dtype=dtype)
        calibrations[family].check(Checkpoint.open(tmp_path / family))


def test_calibrations_of_other_models_are_refused(folders, calibrations, tmp_path):
    checkpoint = Checkpoint.open(folders["qwen2"])
    for family, said in (("llama", "architecture LlamaForCausalLM"), ("qwen3", "architecture Qwen3ForCausalLM")):
        with pytest.raises(ConfigError, match=said):
            calibrations[family].check(checkpoint)
    smaller = make_hf_model(tmp_path, "qwen2", num_hidden_layers=2)[0]
    with pytest.raises(ConfigError, match="num_hidden_layers 3"):
        calibrations["qwen2"].check(Checkpoint.open(smaller))
    other = make_hf_model(tmp_path / "other", "qwen2", seed=1)[0]
    with pytest.raises(ConfigError, match="other weights"):
        calibrations["qwen2"].check(Checkpoint.open(other))
    # The bias alone, or a norm's weights alone, make another model.
    with pytest.raises(ConfigError, match="other weights"):
        calibrate(checkpoint, WINDOWS).check(scaled(checkpoint, np.full((3, 2, 32), 1.1, np.float32)))
    normed = Checkpoint.open(folders["qwen3"])
    with pytest.raises(ConfigError, match="layernorm"):
        calibrations["qwen3"].check(scaled(normed, np.full((3, 2, 32), 1.1, np.float32)))


# -- as a user types it


def test_from_a_text_to_an_engine(tmp_path, capsys):
    file, engine = tmp_path / "calib.safetensors", tmp_path / "engine"
    argv = ["--model_dir", EXAMPLE, "--text", argparse.__file__, "--output", file]
    argv = [str(a) for a in (*argv, "--max_tokens", 600, "--max_seq_len", 300)]
    assert saw_calibrate.main(argv) == 0
    out, err = capsys.readouterr()
    assert err == ""
    rows = dict(line.split(maxsplit=1) for line in out.splitlines())
    assert rows["text"] == "2 sequences of 300 tokens"
    assert "from 600 tokens" in rows["calibration"]
    windows = torch.tensor(calibration_ids(600)).view(2, 300)
    same = calibrate(Checkpoint.open(EXAMPLE), windows)
    np.testing.assert_array_equal(Calibration.load(file).k_center, same.k_center)

    assert rows["next"] == f"saw-build --model_dir {EXAMPLE} --calibration {file} --output_dir engine"
    assert saw_build.main([*rows["next"].split()[1:-1], str(engine)]) == 0
    out, err = capsys.readouterr()
    assert "keys centred" in out
    assert "saw-eval" not in err
    with LLM(engine) as llm:
        assert llm.generate("def read(", SamplingParams(max_tokens=4)).outputs[0].text


def test_a_calibration_of_a_plain_cache_is_warned_of(folders, calibrations, tmp_path, capsys):
    """It may do harm there, which saw-eval shows."""
    calibrations["llama"].save(tmp_path / "c")
    argv = ["--model_dir", folders["llama"], "--kv", "int4", "--calibration", tmp_path / "c", "--dry_run"]
    assert saw_build.main([*map(str, argv), "--output_dir", str(tmp_path / "engine")]) == 0
    assert f"compare with saw-eval --kv int4 --calibration none,{tmp_path / 'c'}" in capsys.readouterr().err


def bad_file(path, kind, tmp_path):
    """A calibration file spoilt in one way."""
    tensors = load_file(path)
    with open(path, "rb") as f:
        head = json.loads(f.read(int.from_bytes(f.read(8), "little")))["__metadata__"]
    out = tmp_path / "bad.safetensors"
    if kind == "truncated":
        out.write_bytes(path.read_bytes()[:-100])
    elif kind == "no calibration":
        save_file({"x": np.zeros(3, np.float32)}, out)
    elif kind == "another shape":
        save_file(tensors | {"smoothing": tensors["smoothing"][:, :, :5].copy()}, out, head)
    elif kind == "NaN":
        tensors["k_center"][0, 0, 0] = np.nan
        save_file(tensors, out, head)
    elif kind == "factors of zero":
        tensors["smoothing"][0, 0, 0] = 0
        save_file(tensors, out, head)
    return out


@pytest.mark.parametrize("kind", ["missing", "truncated", "no calibration", "another shape", "NaN", "factors of zero"])
def test_bad_calibration_files_are_refused(kind, folders, calibrations, tmp_path, capsys):
    calibrations["llama"].save(tmp_path / "c")
    bad = bad_file(tmp_path / "c", kind, tmp_path)
    out = tmp_path / "engine"
    argv = ["--model_dir", folders["llama"], "--calibration", bad, "--output_dir", out]
    assert "saw-calibrate" in refused(capsys, saw_build.main, *argv)
    assert not out.exists()


def test_another_models_calibration_is_refused_by_saw_build(folders, calibrations, tmp_path, capsys):
    calibrations["llama"].save(tmp_path / "c")
    argv = ["--model_dir", folders["mistral"], "--calibration", tmp_path / "c", "--output_dir", tmp_path / "engine"]
    assert "the calibration is of a model with architecture" in refused(capsys, saw_build.main, *argv)
    assert not (tmp_path / "engine").exists()


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"--text": None}, "--text"),
        ({"--text": "nowhere.txt"}, "nowhere.txt"),
        ({"--max_tokens": "200"}, "longer text or a smaller --max_seq_len"),
        ({"--max_tokens": "200", "--max_seq_len": "100"}, "calibration needs 256"),
        ({"--max_seq_len": "4096"}, "max_position_embeddings"),
        ({"--output": "nowhere/c"}, "nowhere is not a folder"),
        ({"--model_dir": None}, "neither of --checkpoint_dir and --model_dir"),
        ({"--checkpoint_dir": "x"}, "both of --checkpoint_dir and --model_dir"),
    ],
)
def test_bad_calibrate_flags_are_refused(change, said, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    flags = {"--model_dir": EXAMPLE, "--text": argparse.__file__} | change
    argv = [word for flag, value in flags.items() if value is not None for word in (flag, value)]
    assert said in refused(capsys, saw_calibrate.main, *argv)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_weights_that_are_not_numbers_are_named(value, tmp_path, capsys):
    model = shutil.copytree(EXAMPLE, tmp_path / "model")
    weights = load_torch(model / "model.safetensors")
    weights["model.layers.2.self_attn.v_proj.weight"][3, 7] = value
    save_torch(weights, model / "model.safetensors", {"format": "pt"})
    said = "tensor 'model.layers.2.self_attn.v_proj.weight' holds NaN or infinite weights"
    argv = ["--model_dir", model, "--text", argparse.__file__, "--output", tmp_path / "c"]
    assert said in refused(capsys, saw_calibrate.main, *argv)
    assert said in refused(capsys, saw_build.main, "--model_dir", model, "--output_dir", tmp_path / "engine")
    assert not (tmp_path / "c").exists()
    assert not list((tmp_path / "engine").iterdir())
