"""Centers and frames: exact without quantization, measured rightly, rejected where they do not belong."""

import argparse
import dataclasses
import json
import shutil

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file, save_file
from safetensors.torch import load_file as load_torch
from safetensors.torch import save_file as save_torch

from saw_trtllm import LLM, SamplingParams
from saw_trtllm.backends.reference.cache import PagedCache
from saw_trtllm.backends.reference.model import ReferenceModel, calibrated_inputs
from saw_trtllm.backends.reference.window import WindowModel
from saw_trtllm.build import build, plan_build
from saw_trtllm.calibrate import Basis, Moments, Statistics, balanced_frames, calibrate, orthogonal_mixing, score_noise
from saw_trtllm.checkpoint import Checkpoint, save_checkpoint
from saw_trtllm.checkpoint.calibration import Calibration, is_invertible
from saw_trtllm.cli import build as saw_build
from saw_trtllm.cli import calibrate as saw_calibrate
from saw_trtllm.engine.config import EngineConfig
from saw_trtllm.engine.pools import Pool
from saw_trtllm.engine.step import DECODE, PREFILL, PoolLayout, StepPacker, StepSequence
from saw_trtllm.errors import ConfigError
from saw_trtllm.eval.levers import measured_calibration, num_steps
from saw_trtllm.eval.outliers import PlantedCheckpoint, plant_key_bias, scale_key_pairs
from saw_trtllm.eval.text import generated_windows, make_windows, read_chats
from saw_trtllm.format import KVFormat, rotate
from saw_trtllm.plan.options import BuildOptions
from saw_trtllm.runtime.tokenizer import Tokenizer
from tests.support.eval_text import calibration_ids
from tests.support.example import EXAMPLE
from tests.support.models import make_hf_model
from tests.support.rejection import rejected
from tests.support.tolerance import EPS, chain_rounding, model_rounding

FAMILIES = ("llama", "mistral", "qwen2", "qwen3", "gemma2", "gemma3")
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
    defaults = {"dtype": "float32", "max_batch_size": 16, "max_num_tokens": 512, "tokens_per_block": 16}
    options = defaults | {"gather_all_token_logits": True} | options
    build(plan_build(BuildOptions(model_dir=model_dir, output_dir=output_dir, **options)))
    return output_dir


def all_logits(engine, chunk=16, prompt=PROMPT, generated=8):
    """Of the prompt, computed in chunks, and of the text after it, decoded: and that text."""
    with LLM(engine, prefill_chunk=chunk) as llm:
        params = SamplingParams(
            max_tokens=generated, ignore_eos=True, return_context_logits=True, return_generation_logits=True
        )
        answer = llm.generate(prompt, params)
    output = answer.outputs[0]
    return np.concatenate([answer.context_logits, output.generation_logits]), output.token_ids


def scaled(checkpoint, factors):
    return PlantedCheckpoint(
        checkpoint, checkpoint.config, lambda name, x: scale_key_pairs(name, x, checkpoint.config, factors)
    )


def logits_of(plan, rows=None):
    """Of a prompt in two chunks and a decode, by the reference with an engine's tensors and a cache of ``rows``."""
    config, model = plan.config, plan.config.pretrained_config
    pools = config.pools if rows is None else [Pool(rows, list(range(model.num_hidden_layers)))]
    layout = config.pool_layout if rows is None else PoolLayout([model.num_hidden_layers])
    cache = PagedCache(pools, 8 * layout.num_tables, model.num_key_value_heads, 16)
    reference = ReferenceModel(model, plan.weights.load, 128, **calibrated_inputs(config, plan.weights.load))
    found = []
    for start, count, kind in ((0, 40, PREFILL), (40, 29, PREFILL), (69, 1, DECODE)):
        sequence = StepSequence(PROMPT[start : start + count], start, 70, kind, layout.entries(range(5)))
        step = StepPacker(layout).pack([sequence])
        found.append(reference.forward(step, cache, all_logits=True))
    return torch.cat(found)


# -- exact without quantization


@pytest.mark.parametrize("family", FAMILIES)
def test_centers_and_frames_leave_the_model(family, folders, calibrations, tmp_path):
    """With unquantized rows, through chunks whose history is in the cache and whose own keys are not, and a decode."""
    calibrations[family].save(tmp_path / "c")
    options = {"model_dir": folders[family], "backend": "reference", "dtype": "float32"}
    expected = logits_of(plan_build(BuildOptions(kv="fp16", **options)))
    plan = plan_build(BuildOptions(calibration=tmp_path / "c", **options))
    assert plan.config.framed_layers == [0, 1, 2]
    # A cap on scores sees the shift that a center is: Gemma 2 has none.
    assert bool(np.abs(calibrations[family].k_center).max() > 0.1) is (family != "gemma2")
    got = logits_of(plan, KVFormat("fp16", 64, "float32"))
    assert np.abs(expected).max() > 1
    largest = max(
        np.linalg.cond(frames).max() for frames in (calibrations[family].k_frame, calibrations[family].v_frame)
    )
    torch.testing.assert_close(got, expected, rtol=0, atol=model_rounding(expected) * max(1, largest / 30))


@pytest.mark.parametrize("family", ["qwen2"])
def test_any_center_and_frame_is_exact(family, folders, calibrations, tmp_path):
    """Some that have nothing to do with the keys, each head's own: what is read from the pool and what is not agree."""
    known, rng = calibrations[family], np.random.default_rng(0)
    center = rng.normal(0, 20, known.k_center.shape).astype(np.float32)
    k_frame, v_frame = rng.normal(size=(2, *known.k_frame.shape)).astype(np.float32) / 8 + np.eye(64, dtype=np.float32)
    dataclasses.replace(known, k_center=center, k_frame=k_frame, v_frame=v_frame).save(tmp_path / "odd")
    options = {"model_dir": folders[family], "backend": "reference", "dtype": "float32"}
    expected = logits_of(plan_build(BuildOptions(kv="fp16", **options)))
    plan = plan_build(BuildOptions(calibration=tmp_path / "odd", **options))
    got = logits_of(plan, KVFormat("fp16", 64, "float32"))
    # Scores of thousands have a rounding a hundred times as large.
    torch.testing.assert_close(got, expected, rtol=0, atol=100 * model_rounding(expected))


def test_skipped_layers_have_no_frames(folders, calibrations, tmp_path):
    calibrations["llama"].save(tmp_path / "c")
    engine = make_engine(folders["llama"], tmp_path / "e", calibration=tmp_path / "c", kv_skip_layers="1")
    config, tensors = EngineConfig.load(engine), load_file(engine / "rank0.engine")
    assert config.saw_int4.k_frame
    assert [f"transformer.layers.{i}.attention.q_frame" in tensors for i in range(3)] == [True, False, True]
    np.testing.assert_array_equal(tensors["transformer.layers.2.attention.k_frame"], calibrations["llama"].k_frame[2])
    product = tensors["transformer.layers.2.attention.k_frame"] @ tensors[
        "transformer.layers.2.attention.q_frame"
    ].swapaxes(1, 2)
    largest = np.linalg.cond(calibrations["llama"].k_frame[2]).max()
    np.testing.assert_allclose(product, np.broadcast_to(np.eye(64), (2, 64, 64)), atol=chain_rounding(64, largest))
    with LLM(engine) as llm:
        assert len(llm.generate(PROMPT, SamplingParams(max_tokens=3, ignore_eos=True)).outputs[0].token_ids) == 3


def test_a_calibrated_cache_withstands_a_key_bias(folders, tmp_path):
    """End to end with 4-bit rows, in chunks and decodes: the bias drowns the keys unless all of them are centred."""
    planted = plant_key_bias(Checkpoint.open(folders["qwen2"]), magnitude=60.0)
    save_checkpoint(planted, tmp_path / "planted", dtype="float32")
    model = {"model_dir": None, "checkpoint_dir": tmp_path / "planted"}
    calibrate(Checkpoint.open(tmp_path / "planted"), WINDOWS).save(tmp_path / "c")
    exact, _ = all_logits(make_engine(output_dir=tmp_path / "exact", kv="fp16", **model))
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


def sensitivity_of(a, head, query, output):
    """``[keys]``: squares of what the output gains, after W_o, for each score, by automatic derivatives."""
    kv, scale = head // (a.q.shape[1] // a.k.shape[1]), a.scale or 1 / 8
    seen = slice(max(0, query + 1 - (a.window or len(a.q))), query + 1)

    def attended(products):
        scores = products * scale
        scores = scores if a.softcap is None else a.softcap * torch.tanh(scores / a.softcap)
        return scores.softmax(-1) @ a.v[seen, kv].double()

    moved = torch.func.jacrev(attended)(a.k[seen, kv].double() @ a.q[query, head].double()) / scale
    found = torch.zeros(len(a.q), dtype=torch.float64)
    found[seen] = torch.einsum("ds,de,es->s", moved, output.double(), moved)
    return found.numpy()


def moment_rounding(largest):
    """Of 24 tokens' moments in fp32: scores of 64 terms, their weights, an output's change, its square, and the sum."""
    return chain_rounding(64 + 24 + 64 + 64 + 24, largest)


@pytest.mark.parametrize("family", ["mistral", "qwen3", "gemma2"])
def test_errors_weigh_as_they_move_the_output(family, folders):
    """Windows of Mistral's layers, Gemma's cap on scores, and every head of a group."""
    checkpoint = Checkpoint.open(folders[family])
    model, seen = WindowModel(checkpoint.config, checkpoint.load, 24), []
    model.hidden(WINDOWS[:1, :24], observe=lambda layer, a: seen.append(a) if layer == 0 else None)
    a = dataclasses.replace(seen[0], window=9 if seen[0].window else None)
    group = checkpoint.config.num_queries_per_kv
    rng = np.random.default_rng(4)
    center, frame = rng.normal(size=(2, 64)), rng.normal(size=(2, 64, 64)) / 8 + np.eye(64)
    half = rng.normal(size=(2, group, 64, 64)) / 8
    center, frame, output = (torch.from_numpy(x).float() for x in (center, frame, half @ half.swapaxes(2, 3)))
    moments = Moments()
    moments.add(a, Basis(center, frame, output))
    q, k = (getattr(a, x).double().numpy() for x in "qk")
    for kv in range(2):
        s = np.stack([[sensitivity_of(a, kv * group + g, i, output[kv, g]) for i in range(24)] for g in range(group)])
        rows = (k[:, kv] - center[kv].numpy()) @ frame[kv].double().numpy()
        queries = q[:, kv * group : (kv + 1) * group].swapaxes(0, 1)
        q_noise = np.square(queries @ np.linalg.inv(frame[kv].double().numpy()).T).sum(-1)
        of_k, of_q = np.einsum("gij,gi->j", s, q_noise), np.einsum("gij,j->gi", s, np.square(np.ptp(rows, axis=-1)))
        mean = of_k @ k[:, kv] / of_k.sum()
        np.testing.assert_allclose(moments.k_mean[kv], mean, rtol=0, atol=moment_rounding(np.abs(mean).max()))
        expected = (of_k[:, None] * (k[:, kv] - mean)).T @ (k[:, kv] - mean) / of_k.sum()
        found = moments.k_covariance(moments.k_mean)[kv]
        np.testing.assert_allclose(found, expected, rtol=0, atol=moment_rounding(np.trace(expected)))
        expected = np.einsum("gi,gid,gie->de", of_q, queries, queries) / of_q.sum()
        np.testing.assert_allclose(moments.q_moment[kv], expected, rtol=0, atol=moment_rounding(np.trace(expected)))


def test_values_weigh_by_the_squares_of_their_attention(folders):
    """Of queries that are 0 every visible token has the same share."""
    checkpoint = Checkpoint.open(folders["llama"])
    model, seen = WindowModel(checkpoint.config, checkpoint.load, 24), []
    model.hidden(WINDOWS[:1, :24], observe=lambda layer, a: seen.append(a) if layer == 0 else None)
    a = dataclasses.replace(seen[0], q=torch.zeros_like(seen[0].q))
    group, eye = checkpoint.config.num_queries_per_kv, torch.eye(64).expand(2, 64, 64)
    moments = Moments()
    moments.add(a, Basis(torch.zeros(2, 64), eye, eye[:, None].expand(2, group, 64, 64)))
    weight = np.array([sum(1 / n**2 for n in range(j, 25)) for j in range(1, 25)])
    v = a.v[:, 0].double().numpy()
    expected = (weight[:, None] * v).T @ v / weight.sum()
    np.testing.assert_allclose(moments.v_moment[0], expected, rtol=0, atol=moment_rounding(np.trace(expected)))


def random_moments(n, heads=3, seed=0):
    """Covariances of keys and moments of queries over four orders of magnitude, as real heads have them."""
    rng = np.random.default_rng(seed)
    basis = np.linalg.qr(rng.normal(size=(2, heads, n, n)))[0]
    return (basis * np.geomspace(1e-2, 1e2, n)) @ basis.swapaxes(-1, -2)


@pytest.mark.parametrize("n", [64, 96, 128, 256])
def test_frames_balance_keys_and_queries(n):
    """Both have the same covariance, spread evenly over the channels, and no other map tried makes less noise.

    But for the channel that all others share, which a row's lo takes up: there keys are 4 times as large.
    """
    c, m = random_moments(n)
    ridge = 1e-3 * np.trace(c, axis1=1, axis2=2).mean() / n * np.eye(n)  # about the same for all heads here
    frames = balanced_frames(c, m)
    inverse = np.linalg.inv(frames)
    keys, queries = frames.swapaxes(1, 2) @ c @ frames, inverse @ m @ inverse.swapaxes(1, 2)
    np.testing.assert_allclose(np.sqrt(keys.sum((1, 2)) / queries.sum((1, 2))), 16, rtol=0.01)
    apart = np.eye(n) - 1 / n
    keys, queries = apart @ keys @ apart, apart @ queries @ apart
    tolerance = 0.1 * np.trace(keys, axis1=1, axis2=2).max() / n  # the ridge moves the smallest eigenvalues
    np.testing.assert_allclose(keys, queries, atol=tolerance)
    channels = np.diagonal(keys, axis1=1, axis2=2)
    assert (channels.max(-1) < (1.1 if n != 96 else 2.5) * channels.mean(-1)).all()
    rotation = np.broadcast_to(orthogonal_mixing(n), c.shape)
    smoothing = np.sqrt(np.sqrt(np.diagonal(m, axis1=1, axis2=2) / np.diagonal(c, axis1=1, axis2=2)))
    best = score_noise(frames, c + ridge, m + ridge)
    assert (best < score_noise(rotation, c + ridge, m + ridge) / 2).all()
    assert (best < score_noise(smoothing[..., None] * rotation, c + ridge, m + ridge)).all()
    for seed in range(3):
        near = frames + 0.05 * np.random.default_rng(seed).normal(size=frames.shape) * np.abs(frames).mean()
        assert (best < score_noise(near, c + ridge, m + ridge)).all()


@pytest.mark.parametrize("n", [64, 96, 128, 256])
def test_mixing_is_orthogonal(n):
    mixing = orthogonal_mixing(n)
    np.testing.assert_allclose(mixing @ mixing.T, np.eye(n), atol=chain_rounding(n, 1))
    assert np.abs(mixing).max() <= (1 if n != 96 else 1.5) / np.sqrt(n) + 1e-7
    if n != 96:
        np.testing.assert_allclose(mixing, rotate(np.eye(n), n), atol=EPS)


def test_singular_moments_have_frames_with_an_inverse():
    """Keys in a plane, queries along a line, or nothing at all: a ridge makes them regular, nothing is rotated."""
    rng = np.random.default_rng(0)
    plane, line = rng.normal(size=(2, 64)), rng.normal(size=(1, 64))
    zero = np.zeros((64, 64))
    c, m = np.stack([plane.T @ plane, plane.T @ plane, zero]), np.stack([line.T @ line, zero, line.T @ line])
    frames = balanced_frames(c, m)
    assert is_invertible(frames.astype(np.float32))
    np.testing.assert_array_equal(frames[1:], np.stack([orthogonal_mixing(64)] * 2))


@pytest.fixture
def biased(folders):
    """Keys whose mean is far from 0."""
    return plant_key_bias(Checkpoint.open(folders["qwen2"]), magnitude=60.0)


def test_each_lever_is_measured_on_text_that_was_kept(biased):
    """A bias of all keys: frames about zero spend their channels on it, and centers take it away."""
    windows, steps = torch.from_numpy(np.random.default_rng(2).integers(3, 203, (8, 120))), []
    found = measured_calibration(biased, windows, steps.append)
    assert sum(steps) == num_steps(windows) == 2 * 6 * 120 + 3 * 240
    assert (found.num_held_out, found.calibration.num_tokens) == (240, 720)
    assert found.centered
    assert found.helps
    assert found.kl_mean["centers and frames"] < found.kl_mean["rotation alone"] / 4
    same = calibrate(biased, windows[[0, 1, 2, 4, 5, 6]])
    np.testing.assert_array_equal(found.calibration.k_frame, same.k_frame)


def test_a_lever_that_harms_is_left_out(folders, monkeypatch):
    """Centers of other keys than those that are read."""
    monkeypatch.setattr(Moments, "k_mean", property(lambda m: np.full((2, 64), 40.0)))
    windows = torch.from_numpy(np.random.default_rng(2).integers(3, 203, (8, 120)))
    found = measured_calibration(Checkpoint.open(folders["llama"]), windows)
    assert not found.centered
    assert found.kl_mean["frames"] < found.kl_mean["centers and frames"]


def test_halves_of_one_text_agree_and_of_two_texts_do_not(folders):
    checkpoint = Checkpoint.open(folders["llama"])
    model = WindowModel(checkpoint.config, checkpoint.load, 120)

    def excess(windows):
        statistics = Statistics(checkpoint, model)
        statistics.gather(windows)
        return statistics.split_half_excess()

    few = torch.from_numpy(np.random.default_rng(1).integers(3, 203, (2, 120)))
    many = torch.from_numpy(np.random.default_rng(1).integers(3, 203, (12, 120)))
    assert excess(few[:1].repeat(2, 1)) == pytest.approx(0, abs=1e-3)  # the ridge is part of the frame
    assert 0 < excess(many) < excess(few) / 2


def test_a_model_that_is_not_finite_is_rejected(folders):
    checkpoint = Checkpoint.open(folders["llama"])
    huge = PlantedCheckpoint(checkpoint, checkpoint.config, lambda n, x: x * 1e30 if n.endswith("qkv.weight") else x)
    with pytest.raises(ConfigError, match="are not finite"):
        calibrate(huge, WINDOWS)


# -- the file


def test_a_file_gives_back_what_was_saved(calibrations, tmp_path):
    saved = calibrations["qwen2"]
    saved.save(tmp_path / "c.safetensors")
    loaded = Calibration.load(tmp_path / "c.safetensors")
    np.testing.assert_array_equal(loaded.k_center, saved.k_center)
    np.testing.assert_array_equal(loaded.k_frame, saved.k_frame)
    np.testing.assert_array_equal(loaded.v_frame, saved.v_frame)
    assert (loaded.shape, loaded.num_tokens, loaded.describe()) == (saved.shape, 360, saved.describe())
    assert [p.name for p in tmp_path.iterdir()] == ["c.safetensors"]


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_other_dtypes_and_splits_of_a_model_are_the_same_model(dtype, folders, calibrations, tmp_path):
    for family in FAMILIES:
        save_checkpoint(Checkpoint.open(folders[family]), tmp_path / family, tp_size=2, dtype=dtype)
        calibrations[family].check(Checkpoint.open(tmp_path / family))


def test_calibrations_of_other_models_are_rejected(folders, calibrations, tmp_path):
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
    argv = [str(a) for a in (*argv, "--max_tokens", 1200, "--max_seq_len", 300)]
    assert saw_calibrate.main(argv) == 0
    out, err = capsys.readouterr()
    assert "make better frames: give about" in err  # 900 tokens are few
    rows = dict(line.split(maxsplit=1) for line in out.splitlines())
    assert rows["text"] == "4 sequences of 300 tokens, 300 of them to test"
    assert "from 900 tokens" in rows["calibration"]
    assert " by centers and frames; change -" in out
    windows = make_windows(calibration_ids(1200), 2048, 300, bos_id=0)
    same = calibrate(Checkpoint.open(EXAMPLE), windows[:3])
    np.testing.assert_array_equal(Calibration.load(file).k_center, same.k_center)

    assert rows["next"] == f"saw-build --model_dir {EXAMPLE} --calibration {file} --output_dir engine"
    assert saw_build.main([*rows["next"].split()[1:-1], str(engine)]) == 0
    out, err = capsys.readouterr()
    assert "keys centered" in out
    assert "saw-eval" not in err
    with LLM(engine) as llm:
        assert llm.generate("def read(", SamplingParams(max_tokens=4)).outputs[0].text


def test_texts_and_conversations_share_the_tokens(folders, tmp_path, capsys):
    """A conversation is read as the model's chat template writes it; a line that is none is named."""
    folder = shutil.copytree(EXAMPLE, tmp_path / "model")
    (folder / "chat_template.jinja").write_text("{% for m in messages %}[{{ m.role }}] {{ m.content }}\n{% endfor %}")
    chat = [{"role": "user", "content": "import os"}, {"role": "assistant", "content": "def read(path):"}]
    (tmp_path / "chats.jsonl").write_text(json.dumps(chat) + "\n\n" + json.dumps({"messages": chat}) + "\n")
    assert read_chats(tmp_path / "chats.jsonl", folder) == ["[user] import os\n[assistant] def read(path):\n"] * 2
    (tmp_path / "bad.jsonl").write_text(json.dumps(chat) + '\n{"text": 1}\n')
    argv = ["--model_dir", folder, "--chat", tmp_path / "bad.jsonl"]
    assert "bad.jsonl has no conversation in line 2" in rejected(capsys, saw_calibrate.main, *argv)
    many = tmp_path / "many.jsonl"
    many.write_text((json.dumps(chat) + "\n") * 40)
    options = {"text": argparse.__file__, "chat": str(many), "output": tmp_path / "c", "max_tokens": 1200}
    _, windows = saw_calibrate._open(saw_calibrate.CalibrateOptions(model_dir=folder, **options))
    assert windows.shape == (4, 300)
    tokenizer = Tokenizer.load(folder)
    rendered = [i for text in read_chats(many, folder) for i in tokenizer.encode(text, add_special_tokens=False)]
    assert windows[:, 0].tolist() == [tokenizer.bos_id] * 4
    assert windows[:, 1:].flatten().tolist() == [*calibration_ids(600), *rendered[:600]][1:1197]


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (["--kv", "int4"], "give --kv saw_int4"),
        (["--kv", "fp16"], "give --kv saw_int4"),
        (["--hadamard_order", "16"], "leave one of them out"),
    ],
)
def test_frames_belong_to_the_rotated_cache(flags, said, folders, calibrations, tmp_path, capsys):
    calibrations["llama"].save(tmp_path / "c")
    argv = ["--model_dir", folders["llama"], "--calibration", tmp_path / "c", *flags]
    assert said in rejected(capsys, saw_build.main, *argv, "--output_dir", tmp_path / "engine")


@pytest.mark.parametrize(("magnitude", "warned"), [(60.0, True), (600.0, True), (0.01, False)])
def test_a_large_key_bias_is_warned_of(magnitude, warned, folders, calibrations, tmp_path, capsys):
    """Of a 4-bit cache that nothing centers; the random model's own bias is small."""
    planted = plant_key_bias(Checkpoint.open(folders["qwen2"]), magnitude=magnitude)
    save_checkpoint(planted, tmp_path / "planted", dtype="float32")
    calibrate(Checkpoint.open(tmp_path / "planted"), WINDOWS).save(tmp_path / "c")
    argv = ["--checkpoint_dir", tmp_path / "planted", "--dry_run", "--output_dir", tmp_path / "engine"]
    for extra, expected in (((), warned), (("--calibration", tmp_path / "c"), False), (("--kv", "fp16"), False)):
        assert saw_build.main([str(a) for a in (*argv, *extra)]) == 0
        assert ("the bias of the keys is up to" in capsys.readouterr().err) == expected


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
        save_file(tensors | {"k_frame": tensors["k_frame"][:, :, :5].copy()}, out, head)
    elif kind == "NaN":
        tensors["k_center"][0, 0, 0] = np.nan
        save_file(tensors, out, head)
    elif kind == "a frame without an inverse":
        tensors["v_frame"][0, 0, 0] = 0
        save_file(tensors, out, head)
    elif kind == "format 1":
        save_file({"k_center": tensors["k_center"]}, out, head | {"format": "saw_trtllm calibration 1"})
    elif kind == "format 3":
        save_file(tensors, out, head | {"format": "saw_trtllm calibration 3"})
    return out


@pytest.mark.parametrize(
    "kind",
    [
        *("missing", "truncated", "no calibration", "another shape", "NaN", "a frame without an inverse"),
        *("format 1", "format 3"),
    ],
)
def test_bad_calibration_files_are_rejected(kind, folders, calibrations, tmp_path, capsys):
    calibrations["llama"].save(tmp_path / "c")
    bad = bad_file(tmp_path / "c", kind, tmp_path)
    out = tmp_path / "engine"
    argv = ["--model_dir", folders["llama"], "--calibration", bad, "--output_dir", out]
    assert "saw-calibrate" in rejected(capsys, saw_build.main, *argv)
    assert not out.exists()


def test_another_models_calibration_is_rejected_by_saw_build(folders, calibrations, tmp_path, capsys):
    calibrations["llama"].save(tmp_path / "c")
    argv = ["--model_dir", folders["mistral"], "--calibration", tmp_path / "c", "--output_dir", tmp_path / "engine"]
    assert "the calibration is of a model with architecture" in rejected(capsys, saw_build.main, *argv)
    assert not (tmp_path / "engine").exists()


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"--text": None}, "--text"),
        ({"--text": "nowhere.txt"}, "nowhere.txt"),
        ({"--max_tokens": "200"}, "gives 200 tokens, and heads of 128 need 683 at least"),
        ({"--max_tokens": "800", "--max_seq_len": "400"}, "2 sequences of 400 tokens, and 3 are needed"),
        ({"--max_tokens": "800", "--max_seq_len": "250"}, "2 sequences and 500 tokens to calibrate on"),
        ({"--text": None, "--chat": argparse.__file__}, "has no chat template"),
        ({"--max_seq_len": "4096"}, "max_position_embeddings"),
        ({"--output": "nowhere/c"}, "nowhere is not a folder"),
        ({"--model_dir": None}, "neither of --checkpoint_dir and --model_dir"),
        ({"--checkpoint_dir": "x"}, "both of --checkpoint_dir and --model_dir"),
    ],
)
def test_bad_calibrate_flags_are_rejected(change, said, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    flags = {"--model_dir": EXAMPLE, "--text": argparse.__file__} | change
    argv = [word for flag, value in flags.items() if value is not None for word in (flag, value)]
    assert said in rejected(capsys, saw_calibrate.main, *argv)
    assert not list(tmp_path.iterdir())


def test_a_calibration_beside_a_text_of_its_own_is_rejected(capsys):
    argv = ["--model_dir", EXAMPLE, "--text", argparse.__file__, "--generate"]
    assert "--generate was given beside a text: leave one of them out" in rejected(capsys, saw_calibrate.main, *argv)


def test_texts_are_drawn_from_what_the_model_predicts():
    """Their tokens' surprise is what the predictions expect of it, within five standard errors."""
    checkpoint = Checkpoint.open(EXAMPLE)
    model = WindowModel(checkpoint.config, checkpoint.load, 64)
    drawn, steps = [], []
    for _ in range(2):
        drawn.append(generated_windows(model, 0, 8, 64, steps.append))
    assert torch.equal(*drawn)
    assert drawn[0].shape == (8, 64)
    assert set(drawn[0][:, 0].tolist()) == {0}
    assert sum(steps) == 2 * 8 * 63
    p = model.logits(model.hidden(drawn[0])[:, :-1]).log_softmax(-1)
    surprise = -p.gather(2, drawn[0][:, 1:, None])[..., 0]
    entropy = -(p.exp() * p).sum(-1)
    assert float(entropy.mean()) > 0.1
    assert float((surprise - entropy).mean().abs()) < 5 * float((surprise - entropy).std()) / (8 * 63) ** 0.5


def test_a_calibration_on_the_models_own_texts(tmp_path, capsys):
    argv = ["--model_dir", EXAMPLE, "--generate", "--output", tmp_path / "c"]
    assert saw_calibrate.main([str(a) for a in (*argv, "--max_tokens", 1024, "--max_seq_len", 128)]) == 0
    said = capsys.readouterr()
    assert "8 sequences of 128 tokens, 256 of them to test" in said.out
    assert "on texts of 128 tokens that the model made up too: on longer ones" in said.err
    assert Calibration.load(tmp_path / "c").num_tokens == 768


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_weights_that_are_not_numbers_are_named(value, tmp_path, capsys):
    model = shutil.copytree(EXAMPLE, tmp_path / "model")
    weights = load_torch(model / "model.safetensors")
    weights["model.layers.2.self_attn.v_proj.weight"][3, 7] = value
    save_torch(weights, model / "model.safetensors", {"format": "pt"})
    said = "tensor 'model.layers.2.self_attn.v_proj.weight' holds NaN or infinite weights"
    argv = ["--model_dir", model, "--text", argparse.__file__, "--output", tmp_path / "c"]
    assert said in rejected(capsys, saw_calibrate.main, *argv)
    assert said in rejected(capsys, saw_build.main, "--model_dir", model, "--output_dir", tmp_path / "engine")
    assert not (tmp_path / "c").exists()
    assert not list((tmp_path / "engine").iterdir())
