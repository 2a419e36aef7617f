"""``saw-plan``: what fits a GPU, by the counts of ``saw-build``."""

from __future__ import annotations

import json
import shlex

import pytest

from saw_trtllm.build import plan_build, tokens_that_fit
from saw_trtllm.checkpoint import Checkpoint
from saw_trtllm.cli import build as saw_build
from saw_trtllm.cli import plan as saw_plan
from saw_trtllm.cli.common import parse_fields
from saw_trtllm.plan.gpus import GPUS, PlannedGpu
from saw_trtllm.plan.options import BuildOptions
from tests.support.example import EXAMPLE
from tests.support.models import make_hf_model
from tests.support.quantized import CASES, write_quantized
from tests.support.rejection import rejected


def planned(capsys, *argv):
    assert saw_plan.main([*map(str, argv), "--json"]) == 0
    return json.loads(capsys.readouterr().out)


@pytest.mark.parametrize("name", GPUS)
def test_counts_are_saw_builds(name, capsys, monkeypatch):
    found = planned(capsys, EXAMPLE, "--gpu", name, "--context", 256, "--concurrency", 3)
    gpu = GPUS[name]
    formats = ("full_prec", "fp8", "int4_wo") if gpu.capability >= (8, 9) else ("full_prec", "int4_wo")
    assert [(c["qformat"], c["kv"]) for c in found["choices"]] == [
        (qformat, kv) for qformat in formats for kv in ("fp16", "saw_int4")
    ]
    for choice in found["choices"]:
        options = BuildOptions(model_dir=EXAMPLE, kv=choice["kv"], qformat=choice["qformat"])
        monkeypatch.setattr("saw_trtllm.build.choose_backend", lambda asked: (PlannedGpu(gpu), ""))
        plan = plan_build(options)
        assert choice["tokens"] == tokens_that_fit(plan)
        assert choice["weights"] == plan.weights.bytes_by_kind()
        assert choice["bytes_per_token"] == plan.config.bytes_per_token
        assert choice["sequences"] == choice["tokens"] // 256
        # The example's embedding is tied: a step reads all of the weights.
        read = sum(choice["weights"].values()) + 3 * 256 * choice["bytes_per_token"]
        assert choice["step_microseconds"] == pytest.approx(read / gpu.bandwidth * 1e6)


def test_the_best_is_a_command_that_works(capsys, tmp_path):
    found = planned(capsys, EXAMPLE / "config.json", "--gpu", "4090", "--context", 200)
    command, *argv = shlex.split(found["best"])
    assert command == "saw-build"
    options = parse_fields(saw_build.make_parser().parse_args(argv), BuildOptions)
    assert (options.model_dir, options.kv, options.qformat, options.max_seq_len) == (
        EXAMPLE,
        "saw_int4",
        "int4_wo",
        200,
    )
    assert saw_build.main([*argv, "--backend", "reference", "--dry_run"]) == 0
    table = capsys.readouterr().out
    assert "INT4 in groups of" in table


def test_fp8_is_left_out_below_sm89(capsys):
    assert saw_plan.main([str(EXAMPLE), "--gpu", "A100"]) == 0
    out = capsys.readouterr().out
    assert "fp8 " not in out
    assert "has compute capability 8.0, and FP8 weights need 8.9" in out


def test_weights_that_come_quantized_stay_or_have_16_bits(capsys, tmp_path):
    source, model = make_hf_model(tmp_path / "source", "llama", num_hidden_layers=1)
    folder = write_quantized(tmp_path / "quantized", model, source, CASES["gptq"])
    found = planned(capsys, folder, "--gpu", "H200", "--context", 128)
    assert {c["qformat"] for c in found["choices"]} == {"auto", "full_prec"}
    as_they_are = found["choices"][0]["weights"]
    # The model is in float32, which a GPU's engine has as float16.
    assert set(as_they_are) == {"float16", "INT4 in groups of 32"}
    assert saw_plan.main([str(folder), "--gpu", "H200", "--context", "128"]) == 0
    rows = capsys.readouterr().out.splitlines()[3:7]
    assert [row.split("  ")[0].strip() for row in rows] == ["as they are", "as they are", "float16", "float16"]
    assert Checkpoint.open(folder).formats


def test_weights_that_saw_build_rejects_are_left_out(capsys, tmp_path):
    source, model = make_hf_model(tmp_path / "source", "llama", num_hidden_layers=1)
    folder = write_quantized(tmp_path / "quantized", model, source, CASES["gptq desc_act"])
    assert saw_plan.main([str(folder), "--gpu", "H200", "--context", "128"]) == 0
    out = capsys.readouterr().out
    assert "backend tensorrt has no layer for: columns belong to groups in an order of their own" in out
    assert "--qformat full_prec" in out.splitlines()[-1]


def test_more_than_fits_is_said(capsys):
    assert saw_plan.main([str(EXAMPLE), "--gpu", "L4", "--concurrency", "100000000"]) == 0
    assert "none of them holds 100000000 sequences" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        (["nowhere", "--gpu", "L4"], "nowhere is neither a folder nor a file"),
        ([EXAMPLE, "--gpu", "L4", "--context", 100000], "--context is 100000: it must be from 2 to the model's"),
        ([EXAMPLE, "--gpu", "L4", "--concurrency", 0], "--concurrency is 0: it must be at least 1"),
    ],
)
def test_what_cannot_be_planned_is_one_sentence(capsys, argv, words):
    assert words in rejected(capsys, saw_plan.main, *argv)


def test_a_config_of_quantized_weights_alone_does_not_tell_which(capsys, tmp_path):
    config = json.loads((EXAMPLE / "config.json").read_text()) | {"quantization_config": CASES["gptq"].config}
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert "give the folder" in rejected(capsys, saw_plan.main, tmp_path / "config.json", "--gpu", "L4")


def test_a_config_beside_model_optimizers_is_of_quantized_weights(capsys, tmp_path):
    (tmp_path / "config.json").write_bytes((EXAMPLE / "config.json").read_bytes())
    (tmp_path / "hf_quant_config.json").write_text(json.dumps(CASES["modelopt FP8"].config))
    assert "give the folder" in rejected(capsys, saw_plan.main, tmp_path / "config.json", "--gpu", "L4")
