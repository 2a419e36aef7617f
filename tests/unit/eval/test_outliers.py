"""Planted outliers leave the function as it was, plain INT4 collapses on them, and the levers bring it back."""

import numpy as np
import pytest
import torch

from saw_trtllm.backends.reference.quantizers import Fp8, QuantizedRows
from saw_trtllm.backends.reference.window import WindowModel
from saw_trtllm.calibrate import calibrate
from saw_trtllm.checkpoint import Checkpoint, save_checkpoint
from saw_trtllm.errors import ConfigError
from saw_trtllm.eval.metrics import evaluate
from saw_trtllm.eval.outliers import FACTORS, plant_key_bias, plant_outliers, stop_slow_pairs
from saw_trtllm.format import KVFormat
from saw_trtllm.model.rope import inverse_frequencies, rotary_cos_sin
from tests.support.eval_text import calibration_ids, held_out_ids
from tests.support.example import EXAMPLE
from tests.support.models import YARN_ROPE, make_hf_model
from tests.support.tolerance import EPS, chain_rounding, model_rounding

#: RoPE's angles over the prompt are not zero where they are said to be, but this small.
STILL = 1e-5
PROMPT = torch.from_numpy(np.random.default_rng(3).integers(3, 203, (2, 200)))
FAMILIES = {
    "llama": {},
    "llama, head_dim 256": {"head_dim": 256, "num_attention_heads": 2, "num_key_value_heads": 1},
    "mistral": {},
    "qwen2": {},
    "qwen3": {},
}


def make(tmp_path, name):
    return Checkpoint.open(make_hf_model(tmp_path, name.split(",")[0], **FAMILIES[name])[0])


def fp32(config):
    return config.model_copy(update={"dtype": "float32"})


def logits(checkpoint, ids=PROMPT):
    model = WindowModel(fp32(checkpoint.config), checkpoint.load, ids.shape[1])
    return model.logits(model.hidden(ids))


def keys(checkpoint, ids=PROMPT):
    """Keys after RoPE by layer: ``[tokens, num_kv_heads, head_dim]``."""
    seen = {}
    model = WindowModel(fp32(checkpoint.config), checkpoint.load, ids.shape[1])
    model.hidden(ids[:1], observe=lambda layer, a: seen.update({layer: a.k}))
    return seen


# -- the function


@pytest.mark.parametrize("name", FAMILIES)
@pytest.mark.parametrize("factors", [FACTORS, (10.0, 100.0)])
def test_outliers_leave_fp32_logits_as_they_were(name, factors, tmp_path):
    checkpoint = make(tmp_path, name)
    before = logits(checkpoint)
    after = logits(plant_outliers(checkpoint, factors=factors))
    assert before.abs().max() > 1
    torch.testing.assert_close(after, before, atol=model_rounding(before), rtol=0)


def test_powers_of_two_leave_the_example_bit_for_bit():
    checkpoint, ids = Checkpoint.open(EXAMPLE), torch.tensor([held_out_ids(300)])
    assert torch.equal(logits(plant_outliers(checkpoint), ids), logits(checkpoint, ids))


@pytest.mark.parametrize("name", ["llama", "mistral", "qwen2"])
def test_a_key_bias_leaves_fp32_logits_as_they_were(name, tmp_path):
    """Scores carry a common shift, about ten times as large as they are, whose rounding is what is left."""
    checkpoint = make(tmp_path, name)
    before = logits(stop_slow_pairs(checkpoint, 2))
    after = logits(plant_key_bias(checkpoint))
    assert before.abs().max() > 1
    torch.testing.assert_close(after, before, atol=10 * model_rounding(before), rtol=0)


def test_a_bias_on_pairs_that_turn_would_not(tmp_path):
    checkpoint = make(tmp_path, "llama")
    planted = plant_key_bias(checkpoint)
    planted.config = planted.config.model_copy(update={"rotary_scaling": None})
    before = logits(checkpoint)
    assert (logits(planted) - before).abs().max() > 100 * model_rounding(before)


@pytest.mark.parametrize("count", [1, 2, 5])
def test_only_the_slowest_pairs_stop(count):
    checkpoint = Checkpoint.open(EXAMPLE)
    config = stop_slow_pairs(checkpoint, count).config
    before, after = inverse_frequencies(checkpoint.config)[0], inverse_frequencies(config)[0]
    np.testing.assert_array_equal(after[:-count], before[:-count])
    assert after[-count:].max() * config.max_position_embeddings <= STILL
    cos, sin = rotary_cos_sin(config, config.max_position_embeddings)[:, -count:].transpose(2, 0, 1)
    assert np.abs(cos - 1).max() <= EPS
    assert np.abs(sin).max() <= STILL


# -- what is planted


@pytest.mark.parametrize("name", ["llama", "qwen2", "qwen3"])
def test_outliers_are_where_they_are_said_to_be(name, tmp_path):
    checkpoint = make(tmp_path, name)
    before, after = keys(checkpoint), keys(plant_outliers(checkpoint, pairs_per_head=3))
    half = checkpoint.config.head_size // 2
    for layer, k in after.items():
        growth = (k / before[layer]).nan_to_num(1.0)[50:].median(0).values
        pairs = growth.view(2, 2, half)  # heads, channels of a pair, pairs
        bound = chain_rounding(checkpoint.config.hidden_size, float(pairs.max()))
        torch.testing.assert_close(pairs[:, 0], pairs[:, 1], atol=bound, rtol=0)
        planted = pairs[:, 0] > 1.5
        assert (planted.sum(-1) == 3).all()
        assert not planted[:, : half // 2].any()
        assert all(min(abs(g - f) for f in FACTORS) < 0.1 for g in pairs[:, 0][planted].tolist())
        if name == "qwen3":
            assert torch.equal(planted[0], planted[1])


def test_the_bias_is_in_one_channel_of_each_slow_pair(tmp_path):
    checkpoint = make(tmp_path, "qwen2")
    before, after = keys(stop_slow_pairs(checkpoint, 2)), keys(plant_key_bias(checkpoint, magnitude=40.0))
    half = checkpoint.config.head_size // 2
    first = after[0] - before[0]  # of the first layer, whose input is the same
    assert (first.std(0) < 0.02).all()
    for head in first.mean(0):
        large = head.abs() > 1
        assert {int(i) % half for i in large.nonzero()} == {half - 1, half - 2}
        assert large.sum() == 2
        assert all(min(abs(abs(b) - m) for m in (40, 80)) < 0.1 for b in head[large].tolist())


def test_planted_models_can_be_saved(tmp_path):
    """As a TensorRT-LLM checkpoint that says all there is to say: the bias makes a Llama a Qwen2."""
    checkpoint = make(tmp_path, "llama")
    for i, planted in enumerate((plant_outliers(checkpoint), plant_key_bias(checkpoint))):
        save_checkpoint(planted, tmp_path / str(i), tp_size=2, dtype="float32")
        saved = Checkpoint.open(tmp_path / str(i))
        assert saved.nbytes() == planted.nbytes("float32")
        assert saved.config.rotary_scaling == planted.config.rotary_scaling
        assert (saved.config.architecture == "Qwen2ForCausalLM") == bool(i)
        assert torch.equal(logits(saved), logits(planted))


def test_what_cannot_carry_a_key_bias_is_rejected(tmp_path):
    with pytest.raises(ConfigError, match="q/k norm"):
        plant_key_bias(make(tmp_path, "qwen3"))
    scaled = Checkpoint.open(make_hf_model(tmp_path, "llama", rope_parameters=YARN_ROPE)[0])
    with pytest.raises(ConfigError, match="RoPE scaling already"):
        plant_key_bias(scaled)


# -- what the levers recover on the example (docs/accuracy.md has more text and more variants)


def losses(checkpoint):
    """Added by plain INT4, by the paper's recipe and by all levers: Quality by name."""
    calibration = calibrate(checkpoint, torch.tensor(calibration_ids(4096)).view(2, 2048))
    k_center, k_frame, v_frame = map(torch.from_numpy, (calibration.k_center, calibration.k_frame, calibration.v_frame))
    rows = KVFormat("saw_int4", 128)
    caches = {
        "int4": QuantizedRows(KVFormat("int4", 128, range_factor=1.0)),
        "recipe": QuantizedRows(KVFormat("saw_int4", 128, range_factor=1.0)),
        "levers": QuantizedRows(rows, None, k_center, k_frame, v_frame),
        "levers, no center": QuantizedRows(rows, None, None, k_frame, v_frame),
    }
    windows = torch.tensor(held_out_ids(2048)).view(2, 1024)
    return evaluate(WindowModel(checkpoint.config, checkpoint.load, 1024), windows, caches)


@pytest.mark.parametrize("plant", [plant_outliers, plant_key_bias])
def test_the_recipe_recovers_most_and_the_levers_nearly_all(plant):
    by = losses(plant(Checkpoint.open(EXAMPLE)))
    lost = by["int4"].nats_lost
    assert lost > np.log(2)
    assert by["recipe"].nats_lost < 0.15 * lost
    assert by["levers"].nats_lost < 0.02 * lost
    assert by["recipe"].kl_mean < 0.15 * by["int4"].kl_mean
    assert by["levers"].kl_mean < 0.02 * by["int4"].kl_mean
    if plant is plant_key_bias:  # frames that were made about a mean need it subtracted
        assert by["levers, no center"].kl_mean > 5 * by["levers"].kl_mean


def test_the_levers_leave_half_of_the_recipes_loss_on_the_unchanged_example():
    """By nats; the divergence, which a shrunken range does not flatter, falls by a third or more."""
    by = losses(Checkpoint.open(EXAMPLE))
    assert 0 < by["recipe"].nats_lost < 0.1
    assert by["levers"].nats_lost < by["recipe"].nats_lost / 2
    assert by["levers"].kl_mean < 0.67 * by["recipe"].kl_mean


class ScaledFp8(Fp8):
    """fp8 with a scale for each head, of the text itself."""

    def quantize(self, layer, k, v):
        scales = [448 / x.abs().amax((0, 2), keepdim=True) for x in (k, v)]
        read = super().quantize(layer, k * scales[0], v * scales[1])
        return tuple(x / scale for x, scale in zip(read, scales, strict=True))


@pytest.mark.parametrize("magnitude", [60.0, 600.0])
def test_a_calibration_bears_any_key_bias(magnitude):
    """In fp32, since fp16 itself has steps of 1 beside a bias of 1200; fp8's grow with the bias, and frames' do not."""
    planted = plant_key_bias(Checkpoint.open(EXAMPLE), magnitude=magnitude)
    planted.config.dtype = "float32"
    calibration = calibrate(planted, torch.tensor(calibration_ids(2048)).view(2, 1024))
    rows = KVFormat("saw_int4", 128)
    caches = {
        "calibrated": QuantizedRows.calibrated(rows, rows, calibration),
        "fp8": ScaledFp8(),
        "plain": QuantizedRows(rows),
    }
    by = evaluate(WindowModel(planted.config, planted.load, 512), torch.tensor(held_out_ids(1024)).view(2, 512), caches)
    assert by["calibrated"].kl_mean < 0.1
    assert by["calibrated"].kl_mean < by["fp8"].kl_mean
    assert by["plain"].kl_mean > 5 * by["calibrated"].kl_mean
