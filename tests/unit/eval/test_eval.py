"""What saw-eval computes, against the engine's own decode and plain arithmetic; and saw-eval as a user types it."""

import html.parser
import importlib.util
import io
import json
import math
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest
import tokenizers
import torch
import torch.nn.functional as F
from safetensors.numpy import load_file, save_file

from saw_trtllm import LLM, SamplingParams
from saw_trtllm.backends.reference import window as forward
from saw_trtllm.backends.reference.cache import PagedCache
from saw_trtllm.backends.reference.model import ReferenceModel, calibrated_inputs
from saw_trtllm.backends.reference.quantizers import (
    Exact,
    QuantizedRows,
    SkipLayers,
    TokenwiseQuantizer,
    bytes_per_token,
)
from saw_trtllm.backends.reference.window import History, WindowModel
from saw_trtllm.build import plan_build
from saw_trtllm.calibrate import calibrate
from saw_trtllm.checkpoint import Checkpoint, save_checkpoint
from saw_trtllm.cli import eval as saw_eval
from saw_trtllm.engine.step import DECODE, StepPacker, StepSequence
from saw_trtllm.errors import BackendUnavailableError, ConfigError
from saw_trtllm.eval.analysis import analyse
from saw_trtllm.eval.baselines import PerChannelKeys
from saw_trtllm.eval.harness import CacheScorer, compared, run_tasks
from saw_trtllm.eval.metrics import continuations, evaluate, greedy_agreement
from saw_trtllm.eval.session import Session
from saw_trtllm.eval.suggest import Bits, Kept, Suggestion, num_measurements, suggest
from saw_trtllm.eval.text import make_windows
from saw_trtllm.eval.variants import Variant, grid, parse_factors
from saw_trtllm.format import KVFormat
from saw_trtllm.plan.options import BuildOptions
from saw_trtllm.runtime.tokenizer import Tokenizer
from tests.support.eval_text import HELD_OUT, calibration_ids, held_out_ids
from tests.support.example import EXAMPLE, build_example
from tests.support.models import make_hf_model
from tests.support.tolerance import example_rounding, model_rounding

TEXT = Path(html.parser.__file__)
IDS = torch.randint(3, 203, (40,), generator=torch.Generator().manual_seed(5))


@pytest.fixture(scope="module")
def example():
    checkpoint = Checkpoint.open(EXAMPLE)
    return WindowModel(checkpoint.config, checkpoint.load, 512)


@pytest.fixture(scope="module")
def windows():
    return torch.tensor(held_out_ids(1024)).view(4, 256)


def window_model(folder, max_seq_len=64):
    checkpoint = Checkpoint.open(folder)
    return WindowModel(checkpoint.config, checkpoint.load, max_seq_len)


class Damaged(TokenwiseQuantizer):
    """Rounds values to a grid, layer by layer as coarse as it is told, and keys not at all."""

    def __init__(self, *steps):
        self.steps = steps

    def quantize(self, layer, k, v):
        return k, (v / self.steps[layer]).round() * self.steps[layer]

    def layer_bytes(self, layer, num_kv_heads, head_dim):
        return 0.0


# -- the forward pass


@pytest.mark.parametrize("family", ["llama", "llama3", "mistral", "qwen2", "qwen3", "gemma2", "gemma3"])
def test_the_exact_window_is_transformers(family, tmp_path):
    folder, model = make_hf_model(tmp_path, family)
    ours = window_model(folder)
    with torch.inference_mode():
        expected = model(IDS[None]).logits
    torch.testing.assert_close(ours.logits(ours.hidden(IDS[None])), expected, atol=model_rounding(expected), rtol=0)


def decoded(plan):
    """Logits of an engine that reads every token from its pool: IDS decoded one by one, the first one too."""
    model = plan.config.pretrained_config
    reference = ReferenceModel(model, plan.weights.load, 64, **calibrated_inputs(plan.config, plan.weights.load))
    layout = plan.config.pool_layout
    cache = PagedCache(plan.config.pools, 4 * layout.num_tables, model.num_key_value_heads, 16)
    logits = []
    for i, token in enumerate(IDS.tolist()):
        step = StepPacker(layout).pack([StepSequence([token], i, 1, DECODE, layout.entries([2, 0, 3]))])
        logits.append(reference.forward(step, cache))
    return torch.cat(logits)


@pytest.mark.parametrize("family", ["llama3", "mistral", "qwen2", "qwen3", "gemma2"])
@pytest.mark.parametrize(
    "options",
    [
        {"kv": "fp16"},
        {"kv": "int4"},
        {"kv": "saw_int4", "hadamard_order": 16, "rotate_v": "disable", "range_factor": 0.9},
        {"kv": "saw_int4", "kv_skip_layers": "0,last"},
        {"kv": "saw_int4", "calibration": True},
        {"kv": "saw_int4", "calibration": True, "kv_skip_layers": "0,last"},
    ],
    ids=lambda options: " ".join(map(str, options.values())),
)
def test_a_window_is_what_an_engine_decodes(family, options, tmp_path):
    """Rotation, V's fold, centring, frames and skipped layers come out as in the reference backend's decode."""
    folder, _ = make_hf_model(tmp_path, family)
    model = window_model(folder)
    calibration, file = None, None
    if options.get("calibration"):
        file = tmp_path / "calib.safetensors"
        text = torch.randint(3, 203, (4, 128), generator=torch.Generator().manual_seed(6))
        calibration = calibrate(Checkpoint.open(folder), text)
        calibration.save(file)
    plan = plan_build(BuildOptions(model_dir=folder, backend="reference", **(options | {"calibration": file})))
    skipped = tuple(plan.config.saw_int4.kv_skip_layers)
    variant = Variant(plan.config.kv_format, plan.config.kv_format, file, skipped)
    quantizer = variant.quantizer(model.exact, calibration)
    logits = model.logits(model.hidden(IDS[None], quantizer))[0]
    exact = model.logits(model.hidden(IDS[None]))[0]
    error = (logits - decoded(plan)).abs()
    # Folded weights are rounded otherwise, so that a component now and then falls on the other side of a code's edge.
    loss = (logits - exact).square().mean().sqrt()
    assert error.quantile(0.1) < model_rounding(exact)
    assert error.square().mean().sqrt() <= max(0.25 * loss, model_rounding(exact))
    assert (loss > 0.02) == (options["kv"] != "fp16")
    shape = (model.config.num_hidden_layers, model.config.num_key_value_heads, model.config.head_size)
    assert bytes_per_token(quantizer, *shape) == plan.config.bytes_per_token


def test_decoding_with_a_history_is_the_window(example, windows):
    quantizer = QuantizedRows(KVFormat("saw_int4", 128))
    ids = windows[:2, :24]
    history = History(quantizer, example.config.num_hidden_layers)
    pieces = [example.hidden(piece, history=history) for piece in ids.split([16, 1, 1, 6], dim=1)]
    decoded, window, exact = torch.cat(pieces, 1), example.hidden(ids, quantizer), example.hidden(ids)
    # Products of other shapes are rounded otherwise, and codes may fall to the other side of an edge.
    assert (decoded - window).norm() < 0.3 * (window - exact).norm()
    assert history.length == 24


@pytest.mark.parametrize("rival", [None, PerChannelKeys(group=4, residual=8)])
@pytest.mark.parametrize("family", ["llama", "mistral"])
def test_tiles_of_queries_change_nothing(family, rival, tmp_path, monkeypatch):
    model = window_model(make_hf_model(tmp_path, family)[0])
    exact, whole = model.hidden(IDS[None]), model.hidden(IDS[None], rival)
    monkeypatch.setattr(forward, "QUERY_TILE", 7)
    # Products of other shapes are rounded otherwise, and a rival's codes may fall to the other side of an edge.
    allowed = model_rounding(whole) * whole.numel() ** 0.5 if rival is None else 0.3 * (whole - exact).norm()
    assert (model.hidden(IDS[None], rival) - whole).norm() < allowed


def test_greedy_continuations_are_the_runtimes(example, windows, open_llm):
    prompts = windows[:3, :60]
    ours = continuations(example, prompts, example.exact, 12)
    params = SamplingParams(max_tokens=12, ignore_eos=True)
    outputs = open_llm("fp16").generate(prompts.tolist(), params)
    assert ours.tolist() == [list(output.outputs[0].token_ids) for output in outputs]


# -- measures


def test_measures_are_plain_arithmetic(example, windows):
    quantizer = QuantizedRows(KVFormat("int4", 128))
    found = evaluate(example, windows, {"fp16": example.exact, "int4": quantizer})
    targets = windows[:, 1:].flatten()
    exact, ours = (
        torch.cat([example.logits(example.hidden(w[None], q))[0, :-1] for w in windows]).double()
        for q in (None, quantizer)
    )
    kl = F.kl_div(ours.log_softmax(-1), exact.log_softmax(-1), reduction="none", log_target=True).sum(-1)
    q, one = found["int4"], example_rounding(exact)
    all_of_them = one / len(targets) ** 0.5  # a mean of roundings with signs of their own
    assert q.nats == pytest.approx(F.cross_entropy(ours, targets).item(), abs=all_of_them)
    assert q.perplexity == pytest.approx(math.exp(q.nats))
    assert q.nats_lost == pytest.approx(q.nats - F.cross_entropy(exact, targets).item(), abs=all_of_them)
    assert q.kl_mean == pytest.approx(kl.mean().item(), abs=all_of_them)
    assert q.kl_p99 == pytest.approx(np.quantile(kl.numpy(), 0.99, method="inverted_cdf"), abs=one)
    assert q.kl_max == pytest.approx(kl.max().item(), abs=one)
    agreement = (exact.argmax(-1) == ours.argmax(-1)).double().mean().item()
    assert q.top1_agreement == pytest.approx(agreement, abs=1.5 / len(targets))  # a near tie may fall either way
    assert q.bytes_per_token == 4 * 2 * 2 * 68
    assert list(q.kl_by_position) == [64, 128, 255]
    by_position = kl.view(4, 255)
    assert q.kl_by_position[128] == pytest.approx(by_position[:, 64:128].mean().item(), abs=one / 256**0.5)
    same = found["fp16"]
    assert (same.nats_lost, same.kl_max, same.top1_agreement, same.bytes_per_token) == (0, 0, 1, 4 * 2 * 2 * 256)


def test_greedy_agreement_ends_at_the_first_difference(example, windows):
    prompts = windows[:4, :64]
    quantizers = {"exact": Exact("float32"), "coarse": Damaged(9, 9, 9, 9)}
    found = greedy_agreement(example, prompts, quantizers, 8)
    assert found["exact"] == (1.0, 1.0)
    exact = continuations(example, prompts, example.exact, 8).tolist()
    coarse = continuations(example, prompts, quantizers["coarse"], 8).tolist()
    first = [next((i for i in range(8) if a[i] != b[i]), 8) for a, b in zip(exact, coarse, strict=True)]
    assert found["coarse"] == (sum(first) / 32, sum(n == 8 for n in first) / 4)
    assert found["coarse"][0] < 0.9


def test_a_constant_on_all_keys_is_no_error(example, windows):
    """The softmax does not see it, so the error of scores must not either."""

    class Shifted(Damaged):
        def quantize(self, layer, k, v):
            return k + 3.0, v

    errors, _ = analyse(example, windows[:1], {"shifted": Shifted(), "int4": QuantizedRows(KVFormat("int4", 128))})
    for name in ("scores", "outputs"):
        assert np.max(getattr(errors["shifted"], name)) < 0.1 * np.min(getattr(errors["int4"], name))
    assert np.min(errors["int4"].scores) > 0.01


def test_errors_are_of_their_layer(example, windows):
    errors, _ = analyse(example, windows[:1], {"damaged": Damaged(1e-6, 0.5, 1e-6, 1e-6)})
    outputs = np.array(errors["damaged"].outputs)
    assert outputs[1].min() > 0.01
    assert outputs[[0, 2, 3]].max() < 0.01 * outputs[1].min()


def test_outliers_are_found(tmp_path):
    """A channel of W_k that is 40 times too large, and its query that makes up for it."""
    checkpoint = Checkpoint.open(EXAMPLE)
    planted = 2 * 128 + 512 + 17 - 256  # layer 2, KV head 0's dim 17 among the rows of Q, K, V

    def load(name):
        tensor = checkpoint.load(name).astype(np.float32)
        if name == "transformer.layers.2.attention.qkv.weight":
            tensor[[planted, planted + 64]] *= 40
        return tensor

    model = WindowModel(checkpoint.config, load, 512)
    _, outliers = analyse(model, torch.tensor(held_out_ids(256))[None], {})
    assert outliers.worst == (2, 0)
    assert outliers.k_largest[2][0] in (17, 81)
    assert outliers.k_ratio[2][0] > 20
    assert outliers.k_ratio_rotated[2][0] < 5
    assert np.max(outliers.v_ratio) < 4
    assert sum(outliers.k_histogram) == pytest.approx(1 / (16 / 81), rel=1e-3)


def test_a_layer_left_to_another_cache_begins_where_it_differs(example, windows):
    """The layers before it are computed once, and what comes out is what a run of its own gives."""
    narrow, others = Damaged(0.2, 0.1, 0.3, 0.2), [example.exact, Damaged(0.01, 0.01, 0.01, 0.01)]
    found = list(example.hidden_by_layer(windows[:1, :64], narrow, others))
    alone = [
        example.hidden(windows[:1, :64], SkipLayers(narrow, (layer,), other)) for layer in range(4) for other in others
    ]
    assert len(found) == len(alone)
    for ours, theirs in zip(found, alone, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=0)


def test_the_damaged_layer_is_suggested(example, windows):
    steps = []
    found = suggest(example, windows[:1], Damaged(0.05, 0.05, 1.5, 0.05), lambda: steps.append(1))
    assert len(steps) == num_measurements(4) == 1 + 4 + 2
    assert found.layers[0].layers == [2]
    assert found.layers[0].gain > 0.9
    assert found.worth == Bits((2,))
    assert [len(kept.layers) for kept in found.together] == [1, 2, 3]
    assert found.together[2].kl_mean < found.layers[0].kl_mean < found.kl_mean
    assert found.layers[0].bytes_per_token == 2 * 2 * 256


def test_a_layer_within_the_noise_is_not_suggested(example, windows, monkeypatch):
    """The larger gain of a layer in half of the text's pieces is no gain if the other half takes it back."""
    from saw_trtllm.eval.metrics import Sums

    even = suggest(example, windows, Damaged(0.05, 0.05, 1.5, 0.05))
    one = suggest(example, windows[:1, :65], Damaged(0.05, 0.05, 1.5, 0.05))
    assert (even.worth, one.worth) == (Bits((2,)), Bits())
    assert one.layers[0].gain_error == float("inf")
    real = Sums.kl_pieces

    def noisy(sums):
        pieces = real(sums)
        return pieces + pieces.mean() ** 2 * 100 * torch.tensor([1.0, -1.0]).repeat(len(pieces))[: len(pieces)]

    monkeypatch.setattr(Sums, "kl_pieces", noisy)
    noise = suggest(example, windows, Damaged(0.05, 0.05, 1.5, 0.05))
    assert noise.layers[0].gain == even.layers[0].gain
    assert noise.worth == Bits()


def test_a_gains_error_is_that_of_paired_pieces(example, windows):
    """Against the textbook, over pieces that are cut here: 255 predictions of a window give three of 85."""
    found = suggest(example, windows[:2], Damaged(0.05, 0.05, 1.5, 0.05))
    quantizers = {s: SkipLayers(Damaged(0.05, 0.05, 1.5, 0.05), s, example.exact) for s in ((), (2,))}
    pieces = {s: [] for s in quantizers}
    for s, quantizer in quantizers.items():
        for window in windows[:2]:
            p = example.logits(example.hidden(window[None])[0, :-1]).log_softmax(-1).double()
            q = example.logits(example.hidden(window[None], quantizer)[0, :-1]).log_softmax(-1).double()
            pieces[s] += (p.exp() * (p - q)).sum(-1).reshape(3, 85).mean(1).tolist()
    differences = np.subtract(pieces[()], pieces[2,])
    error = differences.std(ddof=1) / len(differences) ** 0.5 / np.mean(pieces[()])
    assert found.layers[0].gain_error == pytest.approx(error, rel=1e-3)


def test_bits_are_chosen_for_a_budget(example, windows):
    """A layer whose keys are damaged in 4 bits and not in 8 is given 8, which cost less than 16; then the next."""
    narrow, wide = Damaged(0.4, 0.05, 1.5, 0.05), Damaged(1e-6, 1e-6, 1e-6, 1e-6)
    wide.layer_bytes = lambda layer, heads, dim: 100
    found = suggest(example, windows, narrow, wide=wide, budget=150)
    assert num_measurements(4, wide=True, budget=150) == 1 + 8 + 1
    assert found.worth == Bits((), (2,))
    assert found.worth.flags == "--kv_bits 8/4:2"
    more = suggest(example, windows, narrow, wide=wide, budget=200)
    assert more.worth.wide == (0, 2)
    assert more.together[-1].k8_layers == [0, 2]
    assert more.together[-1].bytes_per_token == 200
    assert more.together[-1].kl_mean < found.layers[0].kl_mean


def test_what_is_within_the_noise_is_not_chosen():
    def kept(layer, gain, error, wide=False):
        found = Kept([], 0.1, gain, error, 100 if wide else 500, gain)
        (found.k8_layers if wide else found.layers).append(layer)
        return found

    layers = [kept(1, 0.4, 0.01, wide=True), kept(1, 0.39, 0.01), kept(3, 0.2, 0.07, wide=True), kept(0, 0.1, 0.03)]
    assert Suggestion(0.1, 0, layers, [], 10000).worth == Bits((0,), (1,))
    assert Suggestion(0.1, 0, layers, [], 99).worth == Bits()
    assert Bits((3, 0), (1,)).flags == "--kv_skip_layers 0,3 --kv_bits 8/4:1"


def test_skipped_layers_are_exact(example, windows):
    quantizers = {
        "none": SkipLayers(Damaged(9, 9, 9, 9), range(4), example.exact),
        "int4": SkipLayers(QuantizedRows(KVFormat("int4", 128)), [1], example.exact),
    }
    found = evaluate(example, windows[:1], quantizers)
    assert found["none"].kl_max < 1e-6
    assert found["int4"].bytes_per_token == 2 * 2 * (3 * 68 + 256)


# -- windows and the grid


def test_windows_are_as_long_as_model_and_text_allow():
    assert make_windows(list(range(1000)), 400).shape == (2, 400)
    assert make_windows(list(range(300)), 400).shape == (1, 300)
    assert make_windows(list(range(1000)), 400, max_seq_len=128, max_tokens=500).tolist()[2][-1] == 383


def test_each_window_begins_as_the_tokenizer_begins_a_text():
    assert make_windows([7, 1, 2, 3, 4, 5], 3, bos_id=7).tolist() == [[7, 1, 2], [7, 3, 4]]
    assert make_windows([1, 2, 3, 4, 5, 6], 3, bos_id=7).tolist() == [[1, 2, 3], [4, 5, 6]]  # its template adds none


def test_the_grid_has_each_cache_once(example):
    found = grid(example.config, ["fp16", "int4", "saw_int4"], [16, 128], [True, False], [(1.0, 1.0), (0.9, 0.95)])
    names = [v.name for v in found]
    assert names[:3] == ["fp16", "int4 γ1", "int4 γ0.9/0.95"]
    assert len(names) == len(set(names)) == 1 + 2 + 8
    assert "saw_int4 h16 K γ1" in names
    assert "saw_int4 h128 KV γ0.9/0.95" in names


def test_factors_of_k_and_v_apart():
    assert parse_factors("0.9,1/0.95") == [(0.9, 0.9), (1.0, 0.95)]
    for text in ("x", "0.9/0.8/0.7", ""):
        with pytest.raises(ConfigError):
            parse_factors(text)


# -- tasks


@pytest.fixture(scope="module")
def scorer(example):
    kv_format = KVFormat("saw_int4", 128)
    variant = Variant(kv_format, kv_format)
    tokenizer = Tokenizer.load(EXAMPLE)
    return CacheScorer(example, tokenizer, Checkpoint.open(EXAMPLE), variant, QuantizedRows(kv_format), 128)


def log_probs(scorer, ids):
    model = scorer._model
    return model.logits(model.hidden(torch.tensor([ids]), scorer._quantizer))[0].log_softmax(-1)


def test_a_score_is_the_sum_of_log_probabilities(scorer):
    ids = held_out_ids(30)
    expected = log_probs(scorer, ids[:-1])[9:].gather(1, torch.tensor(ids[10:])[:, None])
    score, greedy = scorer.score(ids[:10], ids[10:])
    assert score == pytest.approx(expected.sum().item(), abs=example_rounding(expected) * len(expected) ** 0.5)
    assert not greedy
    likeliest = int(log_probs(scorer, ids[:10])[-1].argmax())
    assert scorer.score(ids[:10], [likeliest])[1]
    assert scorer.score(ids[:10], []) == (0.0, True)


def test_continuations_of_one_context_have_the_scores_of_each(scorer):
    """Within an exact cache: rounding to 4 bits may tip by how many rows a product has."""
    exact = CacheScorer(
        scorer._model, scorer.tokenizer, scorer._checkpoint, scorer._variant, scorer._model.exact, scorer.max_length
    )
    ids = held_out_ids(60)
    continuations = [ids[20:23], ids[30:42], ids[40:41]]
    for context in (ids[:20], ids[:1], ids * 2):  # one that is read once, one of a token, one that does not fit
        together = exact.score_each(context, continuations)
        for (score, greedy), continuation in zip(together, continuations, strict=True):
            alone, likeliest = exact.score(context, continuation)
            assert score == pytest.approx(alone, abs=example_rounding(np.float64(alone)) * len(continuation) ** 0.5)
            assert greedy == likeliest
    assert exact.score_each(ids[:20], [[], ids[20:23]])[0] == (0.0, True)


def test_tasks_are_compared_document_by_document():
    def sample(right, scores, target):
        scored = [(x, False) for x in scores]
        return {"filter": "none", "metrics": ["acc"], "acc": right, "filtered_resps": scored, "target": target}

    first = [sample(1.0, [-1.0, -2.0], 0), sample(1.0, [-5.0, -3.0], 1)]
    other = [sample(0.0, [-2.0, -1.5], 0), sample(1.0, [-5.0, -3.5], 1)]
    found = compared(other, first, "fp16", {"acc,none": 0.5})
    assert found == {
        "acc less fp16's,none": -0.5,
        "acc less fp16's_stderr,none": pytest.approx(0.5),
        "nats lost,none": 0.75,
        "nats lost_stderr,none": pytest.approx(0.25),
    }
    generated = [d | {"filtered_resps": ["a text"]} for d in other]
    assert "nats lost,none" not in compared(generated, generated, "fp16", {"acc,none": 0.5})
    assert compared(generated, generated, "fp16", {"acc,none": 0.9}) == {}  # no mean: a product of its own


def test_a_long_context_loses_its_beginning(scorer):
    ids = held_out_ids(300)
    assert scorer.score(ids[:290], ids[290:]) == scorer.score(ids[171:290], ids[290:])


def test_every_token_of_a_text_is_scored_once(scorer):
    text = TEXT.read_text()[:700]
    ids = scorer.tokenizer.encode(text, add_special_tokens=False)
    assert len(ids) > 200
    first = scorer.score([scorer.prefix_token_id], ids[:128])[0]
    rest = scorer.score([ids[127]], ids[128:256])[0] + (scorer.score([ids[255]], ids[256:])[0])
    assert scorer.score_text(text) == pytest.approx(first + rest, abs=1e-3)


def test_texts_are_the_runtimes(scorer, open_llm):
    prompts = ["def read(path):\n", "import os"]
    texts = scorer.generate([(p, {"until": ["\n\n", ""], "max_gen_toks": 20}) for p in prompts])
    expected = open_llm("saw_int4").generate(prompts, SamplingParams(max_tokens=20, stop=["\n\n"]))
    assert texts == [output.outputs[0].text for output in expected]


def test_texts_of_an_engine_with_levers(scorer, tmp_path):
    """The engine that is built for a task has the variant's calibration and skipped layers."""
    file = tmp_path / "calib.safetensors"
    calibrate(scorer._checkpoint, torch.tensor(calibration_ids(512)).view(2, 256)).save(file)
    kv_format = KVFormat("saw_int4", 128, rotate_v=False)
    variant = Variant(kv_format, kv_format, file, (0, 3))
    ours = CacheScorer(scorer._model, scorer.tokenizer, scorer._checkpoint, variant, scorer._quantizer, 128)
    options = {"rotate_v": "disable", "calibration": file, "kv_skip_layers": "0,last"}
    with LLM(build_example(tmp_path / "engine", **options)) as llm:
        expected = llm.generate("def read(path):\n", SamplingParams(max_tokens=20)).outputs[0].text
    assert ours.generate([("def read(path):\n", {"max_gen_toks": 20})]) == [expected]
    apart = Variant(kv_format, KVFormat("saw_int4", 128, hadamard_order=32, rotate_v=False, range_factor=0.5))
    with pytest.raises(ConfigError, match="one for K and V"):
        CacheScorer(scorer._model, scorer.tokenizer, scorer._checkpoint, apart, scorer._quantizer, 128).generate([])


@pytest.mark.skipif(importlib.util.find_spec("lm_eval") is None, reason="lm-evaluation-harness is not installed")
@pytest.mark.filterwarnings("ignore")
def test_a_task_of_our_own(scorer, tmp_path, monkeypatch):
    """One that scores choices, one that scores texts, one that generates."""
    monkeypatch.setenv("HF_HOME", str(tmp_path / "hf"))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    documents = [
        {"prompt": "import", "choices": [" os", " xqzv"], "label": 0},
        {"prompt": "def __init__(", "choices": ["]]", "self"], "label": 1},
    ]
    data = tmp_path / "documents.jsonl"
    data.write_text("\n".join(map(json.dumps, documents)))
    common = f"""
dataset_path: json
dataset_kwargs: {{data_files: {{test: {data}}}}}
test_split: test
"""
    choice = """
task: saw_choice
output_type: multiple_choice
doc_to_text: "{{prompt}}"
doc_to_choice: "{{choices}}"
doc_to_target: label
target_delimiter: ""
metric_list: [{metric: acc, aggregation: mean, higher_is_better: true}]
"""
    text = """
task: saw_text
output_type: loglikelihood_rolling
doc_to_text: ""
doc_to_target: "{{prompt}}"
metric_list: [{metric: byte_perplexity, aggregation: weighted_perplexity, higher_is_better: false}]
"""
    generated = """
task: saw_generated
output_type: generate_until
doc_to_text: "{{prompt}}"
doc_to_target: "{{choices[label]}}"
generation_kwargs: {until: ["\\n"], max_gen_toks: 4}
metric_list: [{metric: exact_match, aggregation: mean, higher_is_better: true}]
"""
    for i, task in enumerate((choice, text, generated)):
        (tmp_path / f"task{i}.yaml").write_text(task + common)
    names = ["saw_choice", "saw_text", "saw_generated"]
    results = run_tasks({"ours": scorer}, names, include_path=tmp_path)["ours"]
    assert results["saw_choice"]["acc,none"] == 1.0
    scores = [scorer.score_text(d["prompt"]) for d in documents]
    size = sum(len(d["prompt"]) for d in documents)
    assert results["saw_text"]["byte_perplexity,none"] == pytest.approx(math.exp(-sum(scores) / size))
    assert "exact_match,none" in results["saw_generated"]
    with pytest.raises(ConfigError, match="is not a task"):
        run_tasks({"ours": scorer}, ["saw_nothing"], include_path=tmp_path)


@pytest.mark.skipif(importlib.util.find_spec("lm_eval") is not None, reason="lm-evaluation-harness is installed")
def test_no_harness_is_said_in_a_sentence(scorer):
    with pytest.raises(BackendUnavailableError, match="pip install lm-eval"):
        run_tasks({"ours": scorer}, ["any"])


# -- the command


def evaluated(*argv):
    options = ["--model_dir", EXAMPLE, "--text", TEXT, "--device", "cpu", *argv]
    return saw_eval.main([str(a) for a in options])


def test_the_command_compares_caches(capsys, tmp_path):
    report = tmp_path / "report"
    args = ["--max_tokens", 512, "--max_seq_len", 256, "--greedy_tokens", 4, "--hadamard_order", "16,128", "--suggest"]
    calibration = tmp_path / "calib.safetensors"
    ids = torch.tensor(calibration_ids(512)).view(2, 256)
    calibrate(Checkpoint.open(EXAMPLE), ids).save(calibration)
    assert evaluated(*args, "--calibration", f"none,{calibration}", "--report", report, "--json") == 0
    printed = json.loads(capsys.readouterr().out)
    assert printed == json.loads((report / "results.json").read_text())
    results = {r["name"]: r for r in printed["results"]}
    assert len(results) == 1 + 1 + 1 + 2 + 1  # exact, fp8, plain, rotated by two orders, and in frames
    fp8, rotated = results["fp8"], results["saw_int4 h128 KV γ0.94"]
    assert fp8["bytes_per_token"] == results["fp16"]["bytes_per_token"] / 2
    assert 0 < fp8["kl_mean"] < rotated["kl_mean"]
    apart = rotated["differences"]["fp8"]
    assert apart["mean"] == pytest.approx(rotated["kl_mean"] - fp8["kl_mean"], rel=0.02)
    assert 0 < apart["error"] < apart["mean"] / 2
    assert results["fp16"]["kl_mean"] == 0
    plain = next(r for name, r in results.items() if name.startswith("int4") and r["calibration"] is None)
    assert plain["kl_mean"] > 0.01
    assert 0 <= plain["greedy_agreement"] <= 1
    assert len(plain["errors"]["scores"]) == 4
    assert printed["num_tokens"] == 512
    assert len(printed["suggestion"]["layers"]) == 2 * 4  # each in the model's dtype, and with keys of 8 bits
    page = (report / "report.html").read_text()
    assert page.count("<svg") == 3 + 2 * 2 + 2
    assert all(name in page for name in results)
    assert str(tmp_path) not in page.replace(str(calibration), "")

    assert (
        evaluated("--max_tokens", 256, "--greedy_tokens", 0, "--kv", "fp16,saw_int4", "--kv_skip_layers", "none;0,last")
        == 0
    )
    table = capsys.readouterr().out
    assert "skip 0,3" in table
    assert "greedy" not in table


def test_weights_and_cache_cost_apart_and_together(capsys):
    args = ["--max_tokens", 512, "--max_seq_len", 256, "--greedy_tokens", 0, "--kv", "fp16,saw_int4", "--json"]
    assert evaluated(*args, "--qformat", "int4_wo") == 0
    rounded = {r["name"]: r for r in json.loads(capsys.readouterr().out)["results"]}
    exact, cached = rounded.values()
    assert exact["kl_mean"] == 0
    assert exact["with_weights"]["kl_mean"] > 0
    # Two sources of noise that know nothing of each other.
    apart = exact["with_weights"]["kl_mean"] + cached["kl_mean"]
    assert cached["with_weights"]["kl_mean"] == pytest.approx(apart, rel=0.3)
    assert evaluated(*args, "--original_dir", EXAMPLE) == 0
    same = next(iter(json.loads(capsys.readouterr().out)["results"]))
    assert same["with_weights"]["kl_mean"] < 1e-6


def test_an_original_is_of_the_same_model(capsys, tmp_path):
    other, _ = make_hf_model(tmp_path, "llama")
    argv = ["--original_dir", other]
    assert "give the model that this one was quantized from" in rejected(capsys, *argv)
    assert "give one of them" in rejected(capsys, *argv, "--qformat", "fp8")


def test_every_step_is_reported(windows):
    """So that the progress bar ends where it says."""
    session = Session(Checkpoint.open(EXAMPLE), windows, "cpu", greedy_tokens=2)
    variants = grid(session.model.config, ["fp16", "int4"])
    quantizers = {v.name: v.quantizer(session.model.exact) for v in variants}
    steps = []
    session.run(variants, quantizers, suggest_for=variants[1], progress=lambda: steps.append(1))
    assert len(steps) == session.num_steps(2, variants[1])


def test_a_tensorrt_llm_checkpoint_and_a_text_from_stdin(capsys, tmp_path, monkeypatch):
    save_checkpoint(Checkpoint.open(EXAMPLE), tmp_path / "ckpt", tp_size=2)
    common = ["--max_tokens", 256, "--greedy_tokens", 0, "--json", "--device", "cpu"]
    perplexities = []
    for source in (["--model_dir", EXAMPLE, "--text", TEXT], ["--checkpoint_dir", tmp_path / "ckpt", "--text", "-"]):
        monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(TEXT.read_bytes())))
        assert saw_eval.main([str(a) for a in [*source, *common]]) == 0
        perplexities.append([r["perplexity"] for r in json.loads(capsys.readouterr().out)["results"]])
    assert perplexities[0] == perplexities[1]


def test_a_report_says_what_it_lacks(capsys, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    monkeypatch.delitem(sys.modules, "saw_trtllm.eval.report", raising=False)
    assert "pip install 'saw-trtllm[eval]'" in rejected(capsys, "--report", tmp_path / "report")
    assert not (tmp_path / "report").exists()


def rejected(capsys, *argv):
    assert evaluated(*argv) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("error: ")
    assert err.count("\n") == 1
    return err


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        (["--max_tokens", 100, "--max_seq_len", 200], "gives 100 tokens and a window is 200"),
        (["--max_seq_len", 4096], "max_position_embeddings 2048"),
        (["--max_tokens", 1], "at least 2"),
        (["--kv", "int3"], "kv 'int3' is unknown"),
        (["--kv", "fp16,,int4"], "nothing between two commas"),
        (["--hadamard_order", "12"], "hadamard_order 12 does not fit"),
        (["--hadamard_order", "big"], "not a list of numbers"),
        (["--rotate_v", "yes"], "enable, disable or both"),
        (["--range_factor", "2"], "range_factor is 2.0"),
        (["--kv_skip_layers", "0,4"], "the layers 0 to 3"),
        (["--kv", "fp16", "--suggest"], "--suggest needs a 4-bit cache"),
        (["--budget", "5000"], "--budget was given without --suggest"),
        (["--calibration", "nowhere.safetensors"], "nowhere.safetensors"),
        (["--device", "abacus"], "device abacus is not available"),
        (["--text", "nowhere.txt"], "nowhere.txt cannot be read"),
        (["--tasks", "any"], "both of --text and --tasks"),
        (["--checkpoint_dir", "x"], "both of --checkpoint_dir and --model_dir"),
    ],
    ids=lambda value: " ".join(map(str, value)) if isinstance(value, list) else None,
)
def test_what_cannot_work_is_said_in_a_sentence(capsys, argv, words):
    assert words in rejected(capsys, *argv)


def test_an_empty_text_is_rejected(capsys, tmp_path):
    (tmp_path / "empty.txt").touch()
    assert "gives 1 tokens and a window is 2" in rejected(capsys, "--text", tmp_path / "empty.txt")


def test_a_token_that_the_model_does_not_have_is_rejected(capsys, tmp_path):
    """A tokenizer with more tokens than the model is taken, a text that holds one of them is not."""
    tokenizer = tokenizers.Tokenizer.from_file(str(EXAMPLE / "tokenizer.json"))
    tokenizer.add_special_tokens(["<pad>"])
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    (tmp_path / "text").write_text("x = 1\n" * 100 + "<pad>")
    said = rejected(capsys, "--tokenizer_dir", tmp_path, "--text", tmp_path / "text")
    assert "the text holds token 1024 and the model has 0 to 1023" in said


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_weights_that_are_not_finite_are_named(capsys, tmp_path, value):
    folder = shutil.copytree(EXAMPLE, tmp_path / "model")
    weights = load_file(folder / "model.safetensors")
    weights["model.layers.3.self_attn.k_proj.weight"][5, 7] = value
    save_file(weights, folder / "model.safetensors")
    said = rejected(capsys, "--model_dir", folder, "--max_tokens", 256)
    assert "model.safetensors: tensor 'model.layers.3.self_attn.k_proj.weight'" in said


def test_a_calibration_of_another_model_is_rejected(capsys, tmp_path):
    other = make_hf_model(tmp_path, "llama")[0]
    ids = torch.randint(0, 203, (2, 128), generator=torch.Generator().manual_seed(7))
    calibrate(Checkpoint.open(other), ids).save(tmp_path / "other.safetensors")
    assert "saw-calibrate on this model" in rejected(capsys, "--calibration", tmp_path / "other.safetensors")


def test_the_texts_are_there():
    assert all(path.is_file() for path in HELD_OUT)
