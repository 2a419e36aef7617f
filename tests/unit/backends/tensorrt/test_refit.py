"""Engines built by the stand-in for TensorRT 10, opened with the weights beside them or those of their checkpoint."""

import json
import os
import re
import shutil
import sys

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from saw_trtllm import LLM, SamplingParams
from saw_trtllm.backends.tensorrt.build import build_engine
from saw_trtllm.backends.tensorrt.constants import Constants, PackedWeights, weight_inputs
from saw_trtllm.build import plan_build
from saw_trtllm.calibrate import calibrate
from saw_trtllm.checkpoint import Checkpoint
from saw_trtllm.cli import build as saw_build
from saw_trtllm.cli import refit as saw_refit
from saw_trtllm.cli import run as saw_run
from saw_trtllm.engine.config import EngineConfig
from saw_trtllm.errors import CheckpointError, EngineError
from saw_trtllm.plan.options import BuildOptions
from saw_trtllm.serve import engine_cache
from tests.support.example import EXAMPLE, build_example
from tests.support.fakes import engine as fake_engine
from tests.support.fakes import stripped
from tests.support.fakes import tensorrt as fake_tensorrt
from tests.support.fakes import tensorrt_86 as fake_tensorrt_86
from tests.support.fakes.gpu import pretend_gpu
from tests.support.models import make_hf_model
from tests.support.rejection import rejected

LIMITS = {"max_batch_size": 16, "max_num_tokens": 128, "max_seq_len": 256}
PROMPTS = [list(b"the cache of a token"), list(b"rotation spreads outliers over the row")]


@pytest.fixture
def machine(monkeypatch):
    """A machine with a GPU and TensorRT 10 that runs the engine in a folder."""
    pretend_gpu(monkeypatch)

    def make(folder):
        return fake_engine.install(monkeypatch, folder, module=stripped.Module)

    return make


@pytest.fixture
def model(tmp_path):
    """A copy of the example model, which a test may change."""
    return shutil.copytree(EXAMPLE, tmp_path / "model")


@pytest.fixture
def built(monkeypatch, tmp_path, model):
    """Build an engine without weights, and give its folder."""

    def make(name="engine", **options):
        pretend_gpu(monkeypatch)
        options = {"model_dir": model, "backend": "tensorrt", "strip_plan": True, **LIMITS, **options}
        plan = plan_build(BuildOptions(output_dir=tmp_path / name, **options))
        plan.output_dir.mkdir()
        build_engine(plan)
        return plan.output_dir

    return make


def texts(folder, **options):
    with LLM(folder, **options) as llm:
        outputs = llm.generate(PROMPTS, SamplingParams(max_tokens=16, ignore_eos=True, logprobs=True))
        return [(o.outputs[0].token_ids, o.outputs[0].logprobs) for o in outputs]


def calibration(folder, path, seed=1):
    windows = np.random.default_rng(seed).integers(3, 250, (8, 64))
    calibrate(Checkpoint.open(folder), __import__("torch").from_numpy(windows)).save(path)
    return path


@pytest.mark.parametrize("options", [{"kv": "fp16"}, {"kv": "int4"}, {"kv": "saw_int4"}, {"calibrated": True}])
def test_one_checkpoint_serves_every_cache_with_the_text_of_whole_engines(options, built, machine, model, tmp_path):
    options = dict(options)
    if options.pop("calibrated", False):
        options["calibration"] = calibration(model, tmp_path / "calibration")
    folder = built(**options)
    whole = build_example(tmp_path / "whole", model_dir=model, **LIMITS, **options)
    assert (folder / "rank0.engine").stat().st_size < 10_000
    machine(folder)
    found, expected = texts(folder), texts(whole)
    if "calibration" in options:  # its frames are in the engine with 22 bits, which may move a code
        found, expected = ([tokens[:1] for tokens, _ in x] for x in (found, expected))
    assert found == expected


@pytest.mark.parametrize(("family", "tables"), [("qwen3", {""}), ("gemma3", {"", "_local"})])
def test_all_but_a_few_bytes_are_left_out_under_the_checkpoints_names(monkeypatch, tmp_path, family, tables):
    pretend_gpu(monkeypatch)
    folder = make_hf_model(tmp_path, family, num_hidden_layers=2)[0]
    for plugin in ("disable", "float16"):
        monkeypatch.setattr("saw_trtllm.backends.tensorrt.build.load_cublas_lt", lambda: True)
        options = {"dtype": "float16", "gemm_plugin": plugin, "strip_plan": True, **LIMITS}
        plan = plan_build(BuildOptions(model_dir=folder, output_dir=tmp_path / plugin, backend="tensorrt", **options))
        plan.output_dir.mkdir()
        build_engine(plan)
        network = fake_tensorrt.Builder.networks[-1]
        weights = [layer.weights.numpy() for layer in network._layers if layer.type.name == "CONSTANT"]
        left_out = {id(array) for array in network.refittable.values()}
        assert sum(array.nbytes for array in weights if id(array) not in left_out) < 1000
        norms = {n for n in plan.weights.shapes if n.endswith(("q_layernorm.weight", "k_layernorm.weight"))}
        merged = {f"transformer.layers.{i}.attention.qk_layernorm" for i in range(2)}
        config = EngineConfig.load(plan.output_dir)
        inputs = weight_inputs(config)
        assert bool(inputs) == (plugin != "disable")
        named = {t.name for t in network._inputs}
        assert inputs.keys() <= named
        assert set(network.refittable) == (set(plan.weights.shapes) - norms - inputs.keys()) | merged | {
            f"rotary_cos_sin{table}" for table in tables
        }
        constants = Constants(config, plan.weights.load)
        for name, array in network.refittable.items():
            assert (constants[name].size, constants[name].dtype) == (array.size, array.dtype), name


@pytest.mark.parametrize("qformat", ["int4_wo", "fp8"])
def test_each_rank_leaves_out_its_part_of_quantized_weights(qformat, monkeypatch, tmp_path):
    pretend_gpu(monkeypatch)
    monkeypatch.setattr("saw_trtllm.backends.tensorrt.build.load_cublas_lt", lambda: True)
    folder = make_hf_model(tmp_path, "llama", num_hidden_layers=1, intermediate_size=256)[0]
    options = {"dtype": "float16", "qformat": qformat, "tp_size": 2, "strip_plan": True, **LIMITS}
    plan = plan_build(BuildOptions(model_dir=folder, output_dir=tmp_path / "engine", backend="tensorrt", **options))
    plan.output_dir.mkdir()
    build_engine(plan)
    assert {path.name for path in plan.output_dir.glob("*.engine")} == {"rank0.engine", "rank1.engine"}
    for rank, network in enumerate(list(fake_tensorrt.Builder.networks)[-2:]):
        weights = plan.weights.of_rank(rank)
        packed = PackedWeights(weights.load)
        inputs = weight_inputs(EngineConfig.load(plan.output_dir))
        assert "transformer.layers.0.mlp.proj.weight.values" in inputs
        given = {t.name: (t.shape, t.dtype.name.lower()) for t in network._inputs}
        for name, spec in inputs.items():
            assert packed(name).shape == spec.shape == given[name][0]
        constants = Constants(weights.config.of_rank(), PackedWeights(weights.load))
        for name, array in network.refittable.items():
            assert (constants[name].size, constants[name].dtype) == (array.size, array.dtype), name


def test_a_whole_engine_keeps_all(built, machine, model, tmp_path):
    """Also what is no part of TensorRT's file: it lies beside that, under its checksum."""
    folder = built(strip_plan=False)
    whole = build_example(tmp_path / "whole", model_dir=model, **LIMITS)
    assert fake_tensorrt.Builder.networks[-1].refittable == {}
    assert fake_tensorrt.Builder.networks[-1].builder_config.flags == set()
    assert EngineConfig.load(folder).saw_int4.weights is None
    shutil.rmtree(model)
    machine(folder)
    assert texts(folder) == texts(whole)


@pytest.mark.parametrize(
    ("damage", "said"),
    [
        (lambda file: file.unlink(), r"rank0\.weights\.safetensors is not there, or not whole: copy the engine again"),
        (lambda file: os.truncate(file, 1000), "is not there, or not whole"),
        (lambda file: save_file({"x": np.zeros(1)}, file), "does not hold the weights that config.json beside it says"),
    ],
)
def test_weights_beside_an_engine_that_are_not_its_own(damage, said, built, machine, monkeypatch):
    """Said before the engine takes memory."""
    folder = built(strip_plan=False)
    damage(folder / "rank0.weights.safetensors")
    module, opened = machine(folder), []
    monkeypatch.setattr(stripped._Runtime, "deserialize_cuda_engine", lambda runtime, data: opened.append(data))
    with pytest.raises(EngineError, match=said):
        texts(folder, verify=False)
    assert (module.cuda.everything(), opened) == ([], [])
    with pytest.raises(EngineError, match=r"rank0\.weights\.safetensors"):
        texts(folder)


# -- other weights


def other_weights(model, folder):
    """The model with other weights, and another end."""
    shutil.copytree(model, folder)
    weights = load_file(folder / "model.safetensors")
    noise = np.random.default_rng(0)
    weights = {n: (w * noise.normal(1, 0.05, w.shape)).astype(w.dtype) for n, w in weights.items()}
    save_file(weights, folder / "model.safetensors")
    return folder


def test_an_engine_gets_other_weights_without_a_build(built, machine, model, tmp_path, capsys):
    first, other = built(), other_weights(model, tmp_path / "other")
    changed = tmp_path / "changed"
    argv = ["--engine_dir", first, "--checkpoint_dir", other, "--output_dir", changed]
    assert saw_refit.main([str(a) for a in argv]) == 0
    assert str(other) in capsys.readouterr().out
    whole = build_example(tmp_path / "whole", model_dir=other, **LIMITS)
    machine(changed)
    assert texts(changed) == texts(whole)
    assert texts(changed) != texts(first)


def test_an_engine_gets_another_calibration_and_finds_a_checkpoint_that_moved(built, machine, model, tmp_path, capsys):
    folder = built(calibration=calibration(model, tmp_path / "first"))
    second = calibration(model, tmp_path / "second", seed=2)
    moved = model.rename(tmp_path / "moved")
    assert "which is not there: put the checkpoint back, or say where it is now with saw-refit" in rejected(
        capsys, saw_run.main, "--engine_dir", folder, "--input_text", "x"
    )
    machine(folder)
    argv = ["--engine_dir", folder, "--checkpoint_dir", moved, "--output_dir", folder]
    assert saw_refit.main([str(a) for a in argv]) == 0
    before = texts(folder)
    assert saw_refit.main([str(a) for a in (*argv, "--calibration", second)]) == 0
    kept, given = load_file(folder / "calibration.safetensors"), load_file(second)
    assert kept.keys() == given.keys()
    assert all(np.array_equal(kept[name], given[name]) for name in given)
    assert texts(folder) != before


def test_an_engine_that_is_kept_belongs_to_the_place_of_its_weights(model, tmp_path, monkeypatch):
    pretend_gpu(monkeypatch)
    monkeypatch.setattr(engine_cache, "_libraries", dict)
    other = shutil.copytree(model, tmp_path / "other")  # with the files' times

    def key(folder, **options):
        options = BuildOptions(model_dir=folder, output_dir=tmp_path / "engine", backend="tensorrt", **options)
        return engine_cache.engine_key(plan_build(options), options)

    assert key(model) == key(other)
    assert key(model, strip_plan=True) != key(other, strip_plan=True)


# -- bad input


@pytest.mark.parametrize("version", ["8.6.0", "10.6.0", "11.2.1"])
def test_an_engine_of_another_tensorrt_is_one_sentence(version, built, machine, capsys):
    folder = built()
    config = EngineConfig.load(folder)
    section = config.saw_int4.model_copy(update={"tensorrt_version": version})
    config.model_copy(update={"saw_int4": section}).save(folder)
    machine(folder)
    said = rejected(capsys, saw_run.main, "--engine_dir", folder, "--input_text", "x")
    assert f"was built with TensorRT {version} and TensorRT 10.14.1 is installed: build it anew" in said


def change(path, **fields):
    config = json.loads(path.read_text())
    path.write_text(json.dumps(config | fields))


def test_a_checkpoint_that_changed_is_one_sentence(built, machine, model, capsys):
    folder = built()
    data = bytearray((model / "model.safetensors").read_bytes())
    data[-1] ^= 1
    (model / "model.safetensors").write_bytes(data)
    machine(folder)
    said = rejected(capsys, saw_run.main, "--engine_dir", folder, "--input_text", "x")
    assert "model.safetensors is not what the engine in" in said
    assert "saw-refit" in said
    assert len(texts(folder, verify=False)) == 2


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        ({"rope_theta": 5000.0}, "is of a model with rotary_base"),
        ({"vocab_size": 100}, "vocab|shape"),
    ],
)
def test_a_checkpoint_of_another_shape_is_one_sentence(fields, expected, built, machine, model, tmp_path, capsys):
    folder = built()
    other = shutil.copytree(model, tmp_path / "other")
    change(other / "config.json", **fields)
    said = rejected(
        capsys, saw_refit.main, "--engine_dir", folder, "--checkpoint_dir", other, "--output_dir", tmp_path / "new"
    )
    assert any(word in said for word in expected.split("|"))
    assert not (tmp_path / "new").exists()


def test_weights_that_do_not_go_together_are_one_sentence(built, machine, model, tmp_path, capsys):
    plain, whole = built("plain"), built("whole", strip_plan=False)
    file = calibration(model, tmp_path / "file")
    out = ["--checkpoint_dir", model, "--output_dir", tmp_path / "new"]
    assert "holds its weights, and others cannot take their place" in rejected(
        capsys, saw_refit.main, "--engine_dir", whole, *out
    )
    assert "has no place for centers of keys" in rejected(
        capsys, saw_refit.main, "--engine_dir", plain, *out, "--calibration", file
    )
    centered = built("centered", calibration=file)
    out[1] = other_weights(model, tmp_path / "other")
    assert "the calibration is of other weights" in rejected(capsys, saw_refit.main, "--engine_dir", centered, *out)
    weights = load_file(out[1] / "model.safetensors")
    name = sorted(weights)[3]
    weights[name] = np.full_like(weights[name], np.nan)
    save_file(weights, out[1] / "model.safetensors")
    assert "holds NaN or infinite weights" in rejected(capsys, saw_refit.main, "--engine_dir", plain, *out)
    assert not (tmp_path / "new").exists()


def test_an_engine_that_does_not_take_its_weights_is_one_sentence(built, machine):
    folder = built()
    module = machine(folder)
    module.unwanted.add("transformer.ln_f.weight")
    with pytest.raises(EngineError, match=r"does not take the weights transformer\.ln_f\.weight"):
        texts(folder)
    module.unwanted.clear()
    module.out_of_memory = True
    with pytest.raises(EngineError, match="does not take its weights"):
        texts(folder)
    assert module.cuda.everything() == []


@pytest.mark.parametrize("name", ["model.norm.weight", "model.layers.3.mlp.up_proj.weight"])
def test_a_weight_that_cannot_be_read_is_its_own_sentence(name, built, machine, model):
    """A constant of the engine, and an input, of which a thread tells that has others on their way."""
    folder = built()
    weights = load_file(model / "model.safetensors")
    weights[name].reshape(-1)[0] = np.inf
    save_file(weights, model / "model.safetensors")
    module = machine(folder)
    with pytest.raises(CheckpointError, match=f"{re.escape(name)}.*NaN or infinite"):
        texts(folder, verify=False)
    assert module.cuda.everything() == []


def test_what_cannot_be_stripped_is_one_sentence(monkeypatch, model, tmp_path, capsys):
    argv = ["--model_dir", model, "--output_dir", tmp_path / "engine", "--strip_plan"]
    said = rejected(capsys, saw_build.main, *argv, "--backend", "reference")
    assert "strip_plan was given, and it is for the backend tensorrt" in said
    pretend_gpu(monkeypatch)
    monkeypatch.setitem(sys.modules, "tensorrt", fake_tensorrt_86.Module())
    said = rejected(capsys, saw_build.main, *argv, "--backend", "tensorrt")
    assert "TensorRT 8.6.0 builds no engine without its weights" in said
