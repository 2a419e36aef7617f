"""The weights' benchmark: two computations of one quantized model, each against the original."""

from __future__ import annotations

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from benchmarks.__main__ import load_report, main
from benchmarks.weights.record import WeightsResults
from benchmarks.weights.run import Compared, pieces
from tests.support.models import make_hf_model
from tests.support.quantized import PRESETS, compressed_tensors, write_quantized

SIZES = {"num_hidden_layers": 1, "hidden_size": 128, "intermediate_size": 256}


def test_means_have_the_error_of_their_pieces():
    x = torch.cat([torch.zeros(1, 64), torch.full((1, 64), 2.0)], 1)
    assert pieces(x) == (1.0, 1.0)  # two observations, 0 and 2


def test_divergence_of_known_predictions():
    original = torch.tensor([0.5, 0.5]).log().expand(1, 64, 2)
    found = torch.tensor([0.75, 0.25]).log().expand(1, 64, 2)
    compared = Compared.of(original, found)
    assert compared.kl.mean() == pytest.approx(0.5 * (torch.tensor(2 / 3).log() + torch.tensor(2.0).log()).item())


def test_a_model_is_the_same_both_ways(tmp_path, capsys):
    pytest.importorskip("compressed_tensors", reason="compressed-tensors is not installed")
    source, model = make_hf_model(tmp_path / "source", "llama", **SIZES)
    case = compressed_tensors(*PRESETS["W4A16 with zero points"])
    folder = write_quantized(tmp_path / "quantized", model, source, case)
    words = Tokenizer(models.WordLevel({f"w{i}": i for i in range(203)}, unk_token="w0"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=words, unk_token="w0").save_pretrained(source)
    (tmp_path / "text.txt").write_text(" ".join(f"w{i % 203}" for i in range(7, 7 + 5 * 256, 5)))
    argv = ["--model_dir", source, "--quantized", folder, "--text", tmp_path / "text.txt", "--max_tokens", 256]
    argv += ["--max_seq_len", 128, "--output", tmp_path / "weights.json"]
    assert main(["weights", *map(str, argv)]) == 0
    (found,) = WeightsResults.load(tmp_path / "weights.json").models
    assert found.weights == "INT4 in groups of 32"
    assert found.ours.kl > 1e-4
    # Scales are fp32 here: the same weights, and fp32's rounding.
    assert found.theirs.kl == pytest.approx(found.ours.kl, rel=1e-3)
    assert found.w8a8 is None
    assert abs(found.kl_difference) < 1e-3 * found.ours.kl
    assert load_report(tmp_path / "weights.json").tables["divergence"][1][1] == "INT4 in groups of 32"
