"""``saw-build`` and ``saw-run`` as a user types them."""

import importlib
import json
import pkgutil
import runpy
import shlex
import shutil
import signal
import subprocess
import sys
import time
from functools import partial

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from saw_trtllm import LLM, KvCacheConfig, SamplingParams, cli, progress
from saw_trtllm.build import plan_build
from saw_trtllm.checkpoint import Checkpoint, save_checkpoint
from saw_trtllm.cli import build as saw_build
from saw_trtllm.cli import convert as saw_convert
from saw_trtllm.cli import run as saw_run
from saw_trtllm.cli.common import TierOptions, parse_fields
from saw_trtllm.engine.config import EngineConfig
from saw_trtllm.errors import BackendUnavailableError
from saw_trtllm.plan.options import BuildOptions
from saw_trtllm.plan.tensorrt_options import NetworkOptions
from saw_trtllm.plugins.library import plugin_library
from tests.support.example import EXAMPLE
from tests.support.fakes.gpu import FREE, pretend_gpu
from tests.support.fakes.gpu import NAME as GPU_NAME
from tests.support.models import make_hf_model
from tests.support.rejection import rejected


@pytest.fixture(autouse=True)
def no_tensorrt(monkeypatch):
    """What is built here by default is the reference's, whatever this machine has."""
    monkeypatch.setitem(sys.modules, "tensorrt", None)


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    """A random Llama without a tokenizer."""
    return make_hf_model(tmp_path_factory.mktemp("small"), "llama")[0]


@pytest.fixture
def model(small, tmp_path):
    """A copy of it to be damaged."""
    return shutil.copytree(small, tmp_path / "model")


@pytest.fixture
def broken_engine(engine, tmp_path):
    """A copy of the example's engine to be damaged."""
    return shutil.copytree(engine("saw_int4"), tmp_path / "broken")


def edit(path, **fields):
    """Change keys of a JSON file; those set to None go."""
    value = json.loads(path.read_text())
    for key, field in fields.items():
        *where, last = key.split("__")
        section = value
        for name in where:
            section = section[name]
        section.pop(last, None)
        if field is not None:
            section[last] = field
    path.write_text(json.dumps(value))


def no_engine(folder):
    return not (folder / "config.json").exists() and not list(folder.glob("rank*")) if folder.exists() else True


# -- saw-build


def test_build_writes_an_engine_and_a_table(tmp_path, capsys):
    out = tmp_path / "engine"
    argv = ["--model", "llama", "--kv", "saw_int4", "--model_dir", str(EXAMPLE), "--output_dir", str(out)]
    assert saw_build.main([*argv, "--max_seq_len", "512", "--max_batch_size", "8", "--tokens_per_block", "64"]) == 0
    stdout, stderr = capsys.readouterr()
    assert stderr == ""
    rows = {line[:17].strip(): line[17:].strip() for line in stdout.splitlines()}
    assert list(rows) == [
        *("model", "backend", "limits", "KV cache", "weights", "KV per token", "tokens that fit"),
        *("engine", "wall time", "next"),
    ]
    # 4 layers x K and V x 2 heads x (64 bytes of codes + 4), against 4 x 2 x 2 x 128 x 2 bytes.
    assert rows["KV per token"] == "1,088 bytes, 4,096 in float16: 3.76x"
    assert rows["KV cache"] == "saw_int4, rows of 68 bytes, K and V rotated by Hadamard blocks of 128"
    assert rows["backend"].startswith("reference (")
    assert "max_input_len 511, max_seq_len 512, max_num_tokens 8192, tokens_per_block 64" in rows["limits"]
    fit, fit_fp16 = (int(t.split()[0].replace(",", "")) for t in rows["tokens that fit"].split(", "))
    assert fit > 3.7 * fit_fp16 > 0
    assert rows["next"] == f"saw-run --engine_dir {out} --input_text Hello --max_output_len 64"
    assert sorted(p.name for p in out.iterdir()) == sorted(
        ["config.json", "rank0.engine"]
        + [n for n in ("generation_config.json", "special_tokens_map.json") if (EXAMPLE / n).exists()]
        + ["tokenizer.json", "tokenizer_config.json"]
    )
    config = json.loads((out / "config.json").read_text())
    assert list(config) == ["version", "pretrained_config", "build_config", "saw_int4"]
    assert config["saw_int4"]["format_version"] == 1
    assert config["saw_int4"]["row_bytes"] == 68
    assert config["build_config"]["plugin_config"]["tokens_per_block"] == 64
    # The command that it says comes next works.
    assert saw_run.main(rows["next"].split()[1:]) == 0
    assert capsys.readouterr().out.startswith("Hello")


def test_dry_run_shows_the_plan_and_writes_nothing(tmp_path, capsys):
    out = tmp_path / "engine"
    assert saw_build.main(["--model_dir", str(EXAMPLE), "--output_dir", str(out), "--dry_run"]) == 0
    stdout = capsys.readouterr().out
    assert "3.76x" in stdout
    assert stdout.endswith(f"dry run: nothing was written to {out}\n")
    assert list(tmp_path.iterdir()) == []


def test_fp16_has_nothing_to_compare_with(tmp_path, capsys):
    assert saw_build.main(["--model_dir", str(EXAMPLE), "--output_dir", str(tmp_path), "--kv", "fp16"]) == 0
    stdout = capsys.readouterr().out
    assert "KV per token     4,096 bytes\n" in stdout
    assert "rotated" not in stdout


def test_flags_reach_the_engine(small, tmp_path):
    out = tmp_path / "engine"
    flags = "--kv saw_int4 --hadamard_order 32 --rotate_v disable --range_factor 0.9 --dtype bfloat16"
    limits = "--max_batch_size 3 --max_input_len 100 --max_seq_len 200 --max_num_tokens 64 --tokens_per_block 16"
    argv = ["--model_dir", str(small), "--output_dir", str(out), *flags.split(), *limits.split()]
    assert saw_build.main([*argv, "--gather_context_logits", "--log_level", "error"]) == 0
    config = EngineConfig.load(out)
    assert (config.pretrained_config.dtype, config.kv_format.range_factor) == ("bfloat16", 0.9)
    assert (config.kv_format.hadamard_order, config.kv_format.rotate_v) == (32, False)
    build = config.build_config
    assert (build.max_batch_size, build.max_input_len, build.max_seq_len, build.max_num_tokens) == (3, 100, 200, 64)
    assert (build.gather_context_logits, build.gather_generation_logits) == (True, False)
    with LLM(out) as llm:
        assert len(llm.generate([5] * 100, SamplingParams(max_tokens=4)).outputs[0].token_ids) == 4


def test_a_split_checkpoint_gives_the_same_engine(small, tmp_path):
    """From a Hugging Face folder, or from what saw-convert made of it for two ranks."""
    save_checkpoint(Checkpoint.open(small), tmp_path / "split", tp_size=2)
    assert saw_build.main(["--model_dir", str(small), "--output_dir", str(tmp_path / "a")]) == 0
    assert saw_build.main(["--checkpoint_dir", str(tmp_path / "split"), "--output_dir", str(tmp_path / "b")]) == 0
    a, b = (load_file(tmp_path / name / "rank0.engine") for name in "ab")
    assert a.keys() == b.keys()
    assert all(np.array_equal(a[name], b[name]) for name in a)
    assert EngineConfig.load(tmp_path / "b").pretrained_config.mapping.tp_size == 1


def test_every_option_is_a_flag_with_help(capsys):
    with pytest.raises(SystemExit) as e:
        saw_build.main(["--help"])
    assert e.value.code == 0
    text = capsys.readouterr().out
    for name, field in BuildOptions.model_fields.items():
        assert f"--{name}" in text
        assert field.description
    assert "{llama,mistral,qwen2,qwen3,gemma2,gemma3}" in text
    assert "by default 2048" in " ".join(text.split())


def test_an_engine_is_replaced_with_all_that_belongs_to_it(small, tmp_path):
    out = tmp_path / "engine"
    assert saw_build.main(["--model_dir", str(EXAMPLE), "--output_dir", str(out)]) == 0
    assert (out / "tokenizer.json").exists()
    assert saw_build.main(["--model_dir", str(small), "--output_dir", str(out)]) == 0
    # The random model has no tokenizer, and its end token is its own.
    assert not (out / "tokenizer.json").exists()
    assert not (out / "tokenizer_config.json").exists()
    assert EngineConfig.load(out).pretrained_config.vocab_size == 203


def test_a_failed_build_leaves_the_old_engine(model, tmp_path, capsys):
    out = tmp_path / "engine"
    argv = ["--model_dir", model, "--output_dir", out, "--dtype", "float16"]
    assert saw_build.main(list(map(str, argv))) == 0
    before = {p.name: p.read_bytes() for p in out.iterdir()}
    weights = load_file(model / "model.safetensors")
    weights["model.layers.2.mlp.down_proj.weight"][3, 4] = 1e6
    save_file(weights, model / "model.safetensors")
    capsys.readouterr()
    err = rejected(capsys, saw_build.main, *argv)
    assert "too large for float16" in err
    assert {p.name: p.read_bytes() for p in out.iterdir()} == before


def test_folded_weights_too_large_for_the_dtype_are_rejected(model, tmp_path, capsys):
    """Eight weights of 60000 fit into fp16; what the rotation makes of them does not."""
    weights = {n: w.astype(np.float16) for n, w in load_file(model / "model.safetensors").items()}
    weights["model.layers.0.self_attn.v_proj.weight"][:16] = 60000
    save_file(weights, model / "model.safetensors")
    edit(model / "config.json", dtype="float16")
    err = rejected(capsys, saw_build.main, "--model_dir", model, "--output_dir", tmp_path / "engine")
    assert "too large for float16" in err
    assert no_engine(tmp_path / "engine")


def truncate(path):
    path.write_bytes(path.read_bytes()[:-1000])


def damage_tensor(path):
    weights = load_file(path)
    del weights["model.layers.1.mlp.up_proj.weight"]
    save_file(weights, path)


BAD_MODELS = {
    "no weights": (lambda m: (m / "model.safetensors").unlink(), "model.safetensors"),
    "truncated weights": (lambda m: truncate(m / "model.safetensors"), "not a whole safetensors file"),
    "empty weights": (lambda m: (m / "model.safetensors").write_bytes(b""), "not a whole safetensors file"),
    "a tensor is missing": (lambda m: damage_tensor(m / "model.safetensors"), "up_proj"),
    "no config": (lambda m: (m / "config.json").unlink(), "config.json"),
    "broken config": (lambda m: (m / "config.json").write_text("{"), "JSON"),
    "binary config": (lambda m: (m / "config.json").write_bytes(b"\xff\xfe"), "JSON"),
    "unknown architecture": (lambda m: edit(m / "config.json", architectures=["MambaForCausalLM"]), "MambaForCausalLM"),
    "config of another model": (lambda m: edit(m / "config.json", head_dim=128), "has shape [512, 96], but [1024, 96]"),
    "broken tokenizer": (lambda m: (m / "tokenizer.json").write_text("{}"), "tokenizer.json"),
}


def test_without_a_tokenizer_the_next_command_takes_ids(model, tmp_path, capsys):
    """What will not work is said at the end of the build, and what comes next works."""
    for flags in ([], ["--max_seq_len", "8"]):
        out = tmp_path / "out'put"
        assert saw_build.main(["--model_dir", str(model), "--output_dir", str(out), *flags]) == 0
        stdout, stderr = capsys.readouterr()
        assert stderr.startswith(f"[WARNING] {model} holds no tokenizer.json: the engine takes token ids")
        assert stderr.count("\n") == 1
        command = shlex.split(stdout.splitlines()[-1][17:])
        assert command[:2] == ["python", "-c"]
        exec(command[2], {})
        assert 1 <= len(json.loads(capsys.readouterr().out)) <= 64


def test_a_tokenizer_larger_than_the_model_is_a_warning(model, tmp_path, capsys):
    """An added pad token, say; the tokens beyond the model's are rejected in prompts."""
    shutil.copyfile(EXAMPLE / "tokenizer.json", model / "tokenizer.json")
    out = tmp_path / "out"
    assert saw_build.main(["--model_dir", str(model), "--output_dir", str(out)]) == 0
    assert "has 1024 tokens and the model 203: a prompt with a token beyond" in capsys.readouterr().err
    assert "ids go from 0 to 202" in rejected(capsys, saw_run.main, "--engine_dir", out, "--input_text", "def main():")


def test_weights_that_are_not_finite_are_named_as_in_the_users_file(model, tmp_path, capsys):
    path, name = model / "model.safetensors", "model.layers.1.self_attn.k_proj.weight"
    weights = load_file(path)
    weights[name][3, 4] = np.nan
    save_file(weights, path)
    for main, out in ((saw_build.main, tmp_path / "engine"), (saw_convert.main, tmp_path / "ckpt")):
        said = rejected(capsys, main, "--model_dir", model, "--output_dir", out)
        assert f"{path}: tensor {name!r} holds NaN or infinite weights" in said
        assert no_engine(out)


@pytest.mark.parametrize("damage", BAD_MODELS)
def test_bad_models_are_rejected(damage, model, tmp_path, capsys):
    spoil, said = BAD_MODELS[damage]
    spoil(model)
    for dry_run in ([], ["--dry_run"]):
        assert said in rejected(
            capsys, saw_build.main, "--model_dir", model, "--output_dir", tmp_path / "out", *dry_run
        )
        assert no_engine(tmp_path / "out")


def test_a_head_dim_that_no_cache_holds(tmp_path, capsys):
    folder, _ = make_hf_model(tmp_path, "llama", head_dim=80)
    err = rejected(capsys, saw_build.main, "--model_dir", folder, "--output_dir", tmp_path / "out")
    assert "head_dim 80 is not supported" in err
    assert no_engine(tmp_path / "out")


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        ("--hadamard_order 48", "hadamard_order 48 does not fit head_dim 64: choose one of 16, 32, 64"),
        ("--hadamard_order 128", "hadamard_order 128"),
        ("--hadamard_order 0", "hadamard_order 0"),
        ("--kv int4 --hadamard_order 64", "no rotation"),
        ("--kv fp16 --rotate_v enable", "no rotation"),
        ("--range_factor 0", "range_factor"),
        ("--range_factor nan", "range_factor"),
        ("--model qwen3", "holds a llama model: give --model llama"),
        ("--max_seq_len 257", "max_position_embeddings 256"),
        ("--max_seq_len 1", "max_seq_len 1 has no room for a prompt and a text: give at least 2"),
        ("--max_seq_len -1", "max_seq_len -1 has no room for a prompt and a text: give at least 2"),
        ("--max_seq_len 0", "max_"),
        ("--max_seq_len -5", "max_"),
        ("--max_input_len 0", "max_input_len"),
        ("--max_input_len 256", "max_input_len 256 leaves no token to generate"),
        ("--max_batch_size 0", "max_batch_size"),
        ("--max_num_tokens 16", "max_num_tokens 16 cannot hold a token of each of max_batch_size 1 sequences"),
        ("--max_num_tokens 100 --max_batch_size 90", "max_num_tokens 100 cannot hold"),
        ("--max_num_tokens 40 --tokens_per_block 64", "max_num_tokens 40 cannot hold"),
        ("--max_num_tokens 0", "max_num_tokens"),
        ("--tokens_per_block 48", "tokens_per_block 48 is not supported"),
        ("--max_beam_width 4", "max_beam_width 4"),
        ("--backend tensorrt", "use --backend reference"),
        ("--backend tensorrt_llm", "use --backend reference"),
    ],
)
def test_bad_flags_are_rejected(flags, said, small, tmp_path, capsys):
    argv = ["--model_dir", small, "--output_dir", tmp_path / "out", *flags.split()]
    err = rejected(capsys, saw_build.main, *argv)
    assert said in err
    assert "Value error" not in err
    assert no_engine(tmp_path / "out")


@pytest.mark.parametrize(
    ("flags", "limits"),
    [
        ("", (2048, 8192, 32)),
        ("--max_num_tokens 64", (32, 64, 32)),
        ("--max_num_tokens 32", (16, 32, 16)),
        ("--max_num_tokens 17", (1, 17, 16)),
        ("--max_num_tokens 64 --tokens_per_block 16", (48, 64, 16)),
        ("--max_num_tokens 64 --max_batch_size 40", (40, 64, 16)),
        ("--max_batch_size 10000", (10000, 10032, 32)),
        ("--max_batch_size 8192 --tokens_per_block 128", (8192, 8320, 128)),
        ("--max_num_tokens 100000", (2048, 100000, 32)),
    ],
)
def test_defaults_give_way_to_what_is_asked_for(flags, limits, small):
    args = saw_build.make_parser().parse_args(["--model_dir", str(small), *flags.split()])
    build = plan_build(parse_fields(args, BuildOptions)).config.build_config
    assert (build.max_batch_size, build.max_num_tokens, build.tokens_per_block) == limits


def test_a_default_length_gives_way_to_a_prompts(tmp_path):
    """Where RoPE scaling stretches a model beyond what its max_position_embeddings says."""
    scaling = {"rope_type": "linear", "factor": 4.0, "rope_theta": 10000.0}
    folder, _ = make_hf_model(tmp_path, "llama", rope_parameters=scaling)
    plan = plan_build(BuildOptions(model_dir=folder, max_input_len=300))
    assert plan.config.build_config.max_seq_len == 301
    assert plan_build(BuildOptions(model_dir=folder)).config.build_config.max_seq_len == 256


def test_one_source_is_needed(small, tmp_path, capsys):
    out = ["--output_dir", tmp_path / "out"]
    assert "neither of" in rejected(capsys, saw_build.main, *out)
    both = ["--model_dir", small, "--checkpoint_dir", small]
    assert "both of" in rejected(capsys, saw_build.main, *both, *out)
    assert "is not a folder" in rejected(capsys, saw_build.main, "--model_dir", tmp_path / "none", *out)
    assert "is not a folder" in rejected(capsys, saw_build.main, "--model_dir", small / "config.json", *out)
    assert no_engine(tmp_path / "out")


def test_folders_that_cannot_or_must_not_be_written(model, engine, tmp_path, capsys):
    (tmp_path / "file").write_text("")
    for out in (tmp_path / "file", tmp_path / "file" / "below"):
        assert "cannot be written" in rejected(capsys, saw_build.main, "--model_dir", model, "--output_dir", out)
    before = (model / "config.json").read_bytes()
    assert "read from" in rejected(capsys, saw_build.main, "--model_dir", model, "--output_dir", model)
    other = shutil.copytree(model, tmp_path / "other")
    assert "not an engine to replace" in rejected(capsys, saw_build.main, "--model_dir", model, "--output_dir", other)
    assert (model / "config.json").read_bytes() == (other / "config.json").read_bytes() == before
    assert "holds an engine" in rejected(
        capsys, saw_build.main, "--model_dir", engine("saw_int4"), "--output_dir", tmp_path / "out"
    )


# -- saw-build --backend tensorrt


def test_build_compiles_an_engine_where_tensorrt_is(tmp_path, monkeypatch, capsys):
    pretend_gpu(monkeypatch)
    out, cache = tmp_path / "engine", tmp_path / "model.cache"
    argv = ["--model_dir", str(EXAMPLE), "--output_dir", str(out), "--output_timing_cache", str(cache)]
    assert saw_build.main(argv) == 0
    rows = {line[:17].strip(): line[17:].strip() for line in capsys.readouterr().out.splitlines()}
    assert rows["backend"] == f"tensorrt (the best here; TensorRT 10.14.1 on {GPU_NAME})"
    fit, fit_fp16 = (int(t.split()[0].replace(",", "")) for t in rows["tokens that fit"].split(", "))
    weights = Checkpoint.open(EXAMPLE).nbytes("float16")
    assert fit == int(0.9 * (FREE - weights)) // 1088
    assert fit_fp16 == int(0.9 * (FREE - weights)) // 4096
    section = EngineConfig.load(out).saw_int4
    assert (section.backend, section.compute_capability, section.plugin_version) == ("tensorrt", "9.0", "1")
    assert cache.is_file()


def test_flags_reach_tensorrts_builder(small, tmp_path, monkeypatch):
    pretend_gpu(monkeypatch)
    flags = "--multiple_profiles disable --builder_optimization_level 2 --workers 4 --dtype float16"
    options = saw_build.make_parser().parse_args(["--model_dir", str(small), *flags.split()])
    plan = plan_build(parse_fields(options, BuildOptions))
    assert plan.network == NetworkOptions(decode_profile=False, optimization_level=2, workers=4)


@pytest.mark.parametrize(
    ("lacking", "why"),
    [
        ("tensorrt", "TensorRT cannot be imported here"),
        ("library", "libsaw_trtllm_plugins_trt10.so is missing"),
        ("gpu", "CUDA finds no GPU (cudaErrorNoDevice)"),
    ],
)
def test_what_tensorrt_lacks_is_said_and_the_reference_taken(lacking, why, small, tmp_path, monkeypatch, capsys):
    pretend_gpu(monkeypatch)
    if lacking == "tensorrt":
        monkeypatch.setitem(sys.modules, "tensorrt", None)
    elif lacking == "library":
        monkeypatch.setattr("saw_trtllm.backends.tensorrt.backend.plugin_library", plugin_library)
        monkeypatch.setattr("saw_trtllm.plugins.library.saw_trtllm.__file__", str(tmp_path / "__init__.py"))
    else:

        def fail():
            raise BackendUnavailableError("CUDA finds no GPU (cudaErrorNoDevice): use --backend reference")

        monkeypatch.setattr("saw_trtllm.backends.tensorrt.device.check_kernels", fail)
    argv = ["--model_dir", str(small), "--output_dir", str(tmp_path / "out")]
    assert why in rejected(capsys, saw_build.main, *argv, "--backend", "tensorrt")
    assert saw_build.main([*argv, "--dry_run"]) == 0
    assert "(the default; " in (said := capsys.readouterr().out)
    assert why in said


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        ("--dtype float32", "the model is in float32, and the plugins compute in 16 bits: give --dtype float16"),
        ("--dtype float16 --input_timing_cache none", "--input_timing_cache none is not a file"),
        ("--dtype float16 --output_timing_cache none/here", "--output_timing_cache none/here cannot be written"),
        ("--dtype float16 --builder_optimization_level 6", "builder_optimization_level"),
        ("--dtype float16 --workers 0", "workers"),
        ("--backend reference --workers 2", "workers was given, and it is for the backend tensorrt, not reference"),
        ("--backend reference --multiple_profiles enable", "multiple_profiles was given"),
    ],
)
def test_bad_flags_for_tensorrt_are_rejected(flags, said, small, tmp_path, monkeypatch, capsys):
    pretend_gpu(monkeypatch)
    argv = ["--model_dir", small, "--output_dir", tmp_path / "out", *flags.split()]
    assert said in rejected(capsys, saw_build.main, *argv)
    assert no_engine(tmp_path / "out")


def test_a_float32_model_is_built_in_float16_on_a_gpu(small, tmp_path, monkeypatch, capsys):
    pretend_gpu(monkeypatch)
    argv = ["--model_dir", str(small), "--output_dir", str(tmp_path / "out"), "--dry_run", "--backend"]
    for backend, dtype in (("tensorrt", "float16"), ("reference", "float32")):
        assert saw_build.main([*argv, backend]) == 0
        model = next(line for line in capsys.readouterr().out.splitlines() if line.startswith("model"))
        assert model.endswith(dtype)


def test_phases_have_bars_of_their_own(monkeypatch, capsys):
    monkeypatch.setattr(saw_build, "tqdm", partial(saw_build.tqdm, mininterval=0))
    bars = saw_build.PhaseBars()
    bars.start("Building Engine", None, 2)
    bars.start("Timing", "Building Engine", 5)
    bars.step("Timing")
    bars.step("a phase that nobody began")
    bars.finish("Timing")
    bars.finish("Building Engine")
    assert "Timing:  20%" in capsys.readouterr().err


@pytest.mark.parametrize(
    "flags",
    ["--max_batch_size many", "--max_seq_len 1.5", "--kv int8", "--model gpt2", "--rotate_v yes", "--no_such_flag"],
)
def test_build_flags_typed_wrongly(flags, small, tmp_path, capsys):
    with pytest.raises(SystemExit) as e:
        saw_build.main(["--model_dir", str(small), "--output_dir", str(tmp_path / "out"), *flags.split()])
    assert e.value.code == 2
    assert flags.split()[0] in capsys.readouterr().err
    assert no_engine(tmp_path / "out")


# -- saw-run


def test_run_prints_prompt_and_text(engine, open_llm, capsys):
    folder = str(engine("saw_int4"))
    argv = ["--engine_dir", folder, "--max_output_len", "12", "--input_text"]
    expected = open_llm().generate(["def f(", "import"], SamplingParams(max_tokens=12))
    first, second = (o.prompt + o.outputs[0].text for o in expected)
    assert saw_run.main([*argv, "def f("]) == 0
    assert capsys.readouterr() == (f"{first}\n", "")
    assert saw_run.main([*argv, "def f(", "import"]) == 0
    assert capsys.readouterr() == (f"{first}\n\n{second}\n\n", "")


def test_run_streams_to_a_pipe(engine):
    """The first piece comes while the engine still has most of the text to make: an endless one would never end."""
    # What a shell has put into the background ignores SIGINT, and so would its children.
    code = (
        "import signal, sys; signal.signal(signal.SIGINT, signal.default_int_handler);"
        "from saw_trtllm.cli.run import main; sys.exit(main(sys.argv[1:]))"
    )
    flags = ["--engine_dir", str(engine("saw_int4")), "--max_output_len", "2000", "--min_tokens", "2000"]
    command = [sys.executable, "-c", code, *flags, "--input_text", "def f(", "import"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        assert process.stdout.read(12).startswith(b"def f(")
        assert process.poll() is None
        process.send_signal(signal.SIGINT)
        process.communicate(timeout=60)
    assert process.returncode == 130


# -- all commands


COMMANDS = sorted({m.name for m in pkgutil.iter_modules(cli.__path__)} - {"common", "conversation"})


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_is_a_module_to_run(name, monkeypatch, capsys):
    monkeypatch.delitem(sys.modules, f"saw_trtllm.cli.{name}", raising=False)
    monkeypatch.setattr(sys, "argv", [name, "--help"])
    with pytest.raises(SystemExit) as e:
        runpy.run_module(f"saw_trtllm.cli.{name}", run_name="__main__", alter_sys=True)
    assert e.value.code == 0
    assert f"usage: saw-{name}" in capsys.readouterr().out


def test_progress_is_a_bar_on_a_terminal_and_lines_elsewhere(monkeypatch, capsys):
    monkeypatch.setattr(progress, "INTERVAL", 0.01)
    with progress.progress(4, "saw-eval", "windows") as bar:
        bar.update(3)
        before = bar._num_lines
        while bar._num_lines < before + 2:  # lines come without another step; the next one may have been begun before
            time.sleep(0.01)
        bar.update()
    *lines, last = capsys.readouterr().err.splitlines()
    assert any(line.startswith("saw-eval: 3/4 windows, 75%, 00:") for line in lines)
    assert last.startswith("saw-eval: 4/4 windows, 100%, 00:")

    monkeypatch.setattr(progress, "INTERVAL", 60)
    with progress.progress(1, "saw-eval", "windows") as bar:
        bar.update()
    assert capsys.readouterr().err == ""  # a short command has nothing to tell

    monkeypatch.setattr(sys.stderr, "isatty", lambda: True, raising=False)
    with progress.progress(1, "saw-eval", "windows") as bar:
        bar.update()
    assert "100%|" in capsys.readouterr().err


def test_run_prints_json(engine, open_llm, capsys):
    sampling = "--temperature 1.0 --top_k 50 --top_p 0.9 --seed 7 --min_tokens 3 --repetition_penalty 1.1"
    argv = ["--engine_dir", str(engine("saw_int4")), "--json", "--max_output_len", "9", *sampling.split()]
    assert saw_run.main([*argv, "--input_text", "def f(", "żółć"]) == 0
    lines = capsys.readouterr().out.splitlines()
    params = SamplingParams(9, 3, temperature=1.0, top_k=50, top_p=0.9, seed=7, repetition_penalty=1.1)
    outputs = open_llm().generate(["def f(", "żółć"], params)
    assert len(lines) == 2
    for line, output in zip(map(json.loads, lines), outputs, strict=True):
        completion = output.outputs[0]
        assert line.pop("batch_seconds") > 0
        assert line == {
            "prompt": output.prompt,
            "text": completion.text,
            "token_ids": completion.token_ids,
            "num_input_tokens": len(output.prompt_token_ids),
            "num_output_tokens": len(completion.token_ids),
            "finish_reason": completion.finish_reason,
        }


def test_run_reads_prompts_from_a_file_or_stdin(engine, tmp_path, capsys):
    (tmp_path / "prompts").write_text("one\ntwo\n", encoding="utf-8")
    argv = ["--engine_dir", str(engine("saw_int4")), "--json", "--max_output_len", "2", "--input_file"]
    assert saw_run.main([*argv, str(tmp_path / "prompts")]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [json.loads(line)["prompt"] for line in lines] == ["one", "two"]
    code = "import sys; from saw_trtllm.cli.run import main; sys.exit(main(sys.argv[1:]))"
    command = [sys.executable, "-c", code, *argv, "-"]
    piped = subprocess.run(command, input="żółw\n".encode(), capture_output=True, timeout=120)
    assert (piped.returncode, piped.stderr) == (0, b"")
    assert json.loads(piped.stdout)["prompt"] == "żółw"


def test_run_stops_at_words(engine, capsys):
    argv = ["--engine_dir", str(engine("saw_int4")), "--json", "--max_output_len", "40", "--input_text", "def f("]
    assert saw_run.main(argv) == 0
    text = json.loads(capsys.readouterr().out)["text"]
    stop = text[10:13]
    assert saw_run.main([*argv, "--stop_words", stop]) == 0
    stopped = json.loads(capsys.readouterr().out)
    assert (stopped["text"], stopped["finish_reason"]) == (text[: text.find(stop)], "stop")


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        ("--max_output_len 0", "max_tokens is 0"),
        ("--max_output_len -3", "max_tokens is -3"),
        ("--max_output_len 5000", "exceed the engine's max_seq_len 2048"),
        ("--temperature nan", "temperature is nan"),
        ("--temperature inf", "temperature is inf"),
        ("--temperature -1", "temperature"),
        ("--top_p 1.5", "top_p"),
        ("--top_k -1", "top_k"),
        ("--seed -1", "seed"),
        ("--min_tokens 100", "min_tokens"),
        ("--repetition_penalty 0", "repetition_penalty"),
        ("--kv_cache_max_tokens 0", "max_tokens is 0"),
        ("--kv_cache_max_tokens 31", "a block has 32"),
        ("--kv_cache_max_tokens 32", "the KV cache has 1"),
        ("--kv_cache_free_gpu_memory_fraction nan", "free_gpu_memory_fraction"),
        ("--kv_cache_free_gpu_memory_fraction 0", "free_gpu_memory_fraction"),
        ("--tokenizer_dir /nowhere", "tokenizer.json"),
    ],
)
def test_bad_requests_are_rejected(flags, said, engine, capsys):
    argv = ["--engine_dir", engine("saw_int4"), "--input_text", "def f(", *flags.split()]
    assert said in rejected(capsys, saw_run.main, *argv)


def test_bad_prompts_are_rejected(engine, tmp_path, capsys):
    argv = ["--engine_dir", engine("saw_int4")]
    assert "the prompt is empty" in rejected(capsys, saw_run.main, *argv, "--input_text", "")
    assert "prompt 2: the prompt is empty" in rejected(capsys, saw_run.main, *argv, "--input_text", "good", "")
    # Bytes of a command line that are no UTF-8 come as lone surrogates.
    assert "not valid UTF-8" in rejected(capsys, saw_run.main, *argv, "--input_text", "a\udcffb")
    long = "x = 1\n" * 3000
    assert "the engine takes 2047" in rejected(capsys, saw_run.main, *argv, "--input_text", long)
    bad = tmp_path / "prompts"
    assert "cannot be read" in rejected(capsys, saw_run.main, *argv, "--input_file", bad)
    bad.write_bytes(b"good\nb\xffd\n")
    assert "not valid UTF-8 at byte 6" in rejected(capsys, saw_run.main, *argv, "--input_file", bad)
    bad.write_bytes(b"")
    assert "holds no prompt" in rejected(capsys, saw_run.main, *argv, "--input_file", bad)
    bad.write_bytes(b"one\n\ntwo\n")
    assert f"line 2 of {bad} is empty: write a prompt" in rejected(capsys, saw_run.main, *argv, "--input_file", bad)
    bad.write_text(f"one\ntwo\n{long}".replace("x = 1\n", "x = 1;"), encoding="utf-8")
    assert "line 3: the prompt has" in rejected(capsys, saw_run.main, *argv, "--input_file", bad)


def other_weights(path):
    weights = load_file(path)
    name = "transformer.layers.1.mlp.proj.weight"
    weights[name] = np.ascontiguousarray(weights[name].T)
    save_file(weights, path)


BAD_ENGINES = {
    "no config": (lambda e: (e / "config.json").unlink(), "holds no config.json: give the --output_dir"),
    "broken config": (lambda e: (e / "config.json").write_text("{]"), "JSON"),
    "a list": (lambda e: (e / "config.json").write_text("[]"), "not a JSON object"),
    "not an engine": (lambda e: edit(e / "config.json", saw_int4=None), "no engine of saw-build"),
    "another format": (
        lambda e: edit(e / "config.json", saw_int4__format_version=2),
        "format version 2 and this runtime reads version 1: build the engine anew",
    ),
    "no format": (lambda e: edit(e / "config.json", saw_int4__format_version=None), "format version None"),
    "another row": (lambda e: edit(e / "config.json", saw_int4__row_bytes=72), "damaged"),
    "another head": (
        lambda e: edit(e / "config.json", saw_int4__head_dim=64, saw_int4__hadamard_order=64, saw_int4__row_bytes=36),
        "damaged",
    ),
    "another order": (lambda e: edit(e / "config.json", saw_int4__hadamard_order=48), "damaged"),
    "no model": (lambda e: edit(e / "config.json", pretrained_config=None), "pretrained_config"),
    "no heads": (lambda e: edit(e / "config.json", pretrained_config__num_attention_heads=0), "num_attention_heads"),
    "no limit": (lambda e: edit(e / "config.json", build_config__max_seq_len=None), "max_seq_len"),
    "another backend": (lambda e: edit(e / "config.json", saw_int4__backend="tensorrt"), "--backend reference"),
    "no engine file": (lambda e: (e / "rank0.engine").unlink(), "rank0.engine"),
    "truncated engine": (lambda e: truncate(e / "rank0.engine"), "rank0.engine cannot be read as an engine"),
    "another file": (lambda e: (e / "rank0.engine").write_bytes(b"x" * 100), "rank0.engine cannot be read"),
    "other weights": (lambda e: other_weights(e / "rank0.engine"), "mlp.proj.weight has the shape"),
    "broken tokenizer": (lambda e: (e / "tokenizer.json").write_text("?"), "tokenizer.json cannot be read"),
    "broken generation config": (lambda e: (e / "generation_config.json").write_text("?"), "generation_config.json"),
}


@pytest.mark.parametrize("damage", BAD_ENGINES)
def test_bad_engines_are_rejected(damage, broken_engine, capsys):
    spoil, said = BAD_ENGINES[damage]
    spoil(broken_engine)
    assert said in rejected(capsys, saw_run.main, "--engine_dir", broken_engine, "--input_text", "x", "--no_verify")


def test_no_engine_at_all(tmp_path, capsys):
    assert "is not a folder" in rejected(capsys, saw_run.main, "--engine_dir", tmp_path / "none", "--input_text", "x")
    assert "config.json" in rejected(capsys, saw_run.main, "--engine_dir", tmp_path, "--input_text", "x")


@pytest.mark.parametrize("flags", ["--max_output_len many", "--temperature hot", "--top_k 1.5", "--seed x", "--what"])
def test_run_flags_typed_wrongly(flags, engine, capsys):
    with pytest.raises(SystemExit) as e:
        saw_run.main(["--engine_dir", str(engine("saw_int4")), "--input_text", "x", *flags.split()])
    assert e.value.code == 2
    assert flags.split()[0] in capsys.readouterr().err


def test_run_needs_an_engine_and_a_prompt(engine, capsys):
    for argv in ([], ["--input_text", "x"], ["--engine_dir", str(engine("saw_int4"))]):
        with pytest.raises(SystemExit) as e:
            saw_run.main(argv)
        assert e.value.code == 2
    capsys.readouterr()


@pytest.mark.parametrize("command", ["bench", "serve", "triton"])
def test_the_tiers_of_the_cache_are_flags_of_whatever_opens_an_engine_to_many(command, tmp_path):
    argv = ["--host_cache_size", "4096", "--disk_cache_dir", str(tmp_path), "--disk_cache_size", "8192"]
    argv = [*argv, "--deterministic", "--engine_dir", "engine"]
    parser = importlib.import_module(f"saw_trtllm.cli.{command}").make_parser()
    args = parser.parse_args(["throughput", *argv] if command == "bench" else argv)
    tiers = parse_fields(args, TierOptions)
    assert KvCacheConfig(**tiers.model_dump()) == KvCacheConfig(
        host_cache_size=4096, disk_cache_dir=tmp_path, disk_cache_size=8192, deterministic=True
    )
