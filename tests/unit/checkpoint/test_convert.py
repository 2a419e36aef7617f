"""``saw-convert`` as a person types it."""

from __future__ import annotations

import json
import shlex
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file, save_file

from saw_trtllm.checkpoint import TOKENIZER_FILES, Checkpoint, convert
from saw_trtllm.checkpoint.families import family_of
from saw_trtllm.cli.convert import main
from tests.support.models import FAMILIES, make_hf_model


@pytest.fixture(scope="module")
def llama(tmp_path_factory) -> Path:
    return make_hf_model(tmp_path_factory.mktemp("model"), "llama", torch.bfloat16, max_shard_size="300KB")[0]


@pytest.fixture
def broken(llama, tmp_path) -> Path:
    """A copy to damage."""
    return Path(shutil.copytree(llama, tmp_path / "broken"))


def command(model_dir: Path, output_dir: Path, **flags) -> int:
    argv = ["--model_dir", str(model_dir), "--output_dir", str(output_dir)]
    for key, value in flags.items():
        argv += [f"--{key}", str(value)]
    return main(argv)


def rejected(capsys, model_dir: Path, output_dir: Path, **flags) -> str:
    """Run a conversion that must fail, and return its one line on stderr."""
    assert command(model_dir, output_dir, **flags) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("error: ")
    assert err.endswith("\n")
    assert err.count("\n") == 1
    return err


@pytest.mark.parametrize("family", FAMILIES)
def test_converts_and_says_what_comes_next(tmp_path, capsys, family):
    folder, model = make_hf_model(tmp_path, family, torch.float16)
    out = tmp_path / "deep" / "check point"
    assert command(folder, out, tp_size=2) == 0
    stdout, stderr = capsys.readouterr()
    assert stderr == ""  # it takes no ten seconds
    table = dict(line.split(None, 1) for line in stdout.splitlines())
    assert table["architecture"] == type(model).__name__
    assert table["layers"] == "3"
    assert int(table["parameters"].replace(",", "")) == model.num_parameters()
    assert table["dtype"] == "float16"
    assert table["tp_size"] == "2"
    files = ("config.json", "rank0.safetensors", "rank1.safetensors")
    assert int(table["written"].split()[0].replace(",", "")) == sum((out / f).stat().st_size for f in files)
    next_command = shlex.split(table["next"])
    assert next_command[0] == "saw-build"
    assert next_command[next_command.index("--checkpoint_dir") + 1] == str(out)
    assert next_command[next_command.index("--model") + 1] == family_of(Checkpoint.open(folder).config).name


@pytest.mark.parametrize(
    ("dtype", "numpy_dtype"), [("auto", "bfloat16"), ("float16", "float16"), ("float32", "float32")]
)
def test_dtype(llama, tmp_path, dtype, numpy_dtype):
    assert command(llama, tmp_path / "out", dtype=dtype) == 0
    assert {t.dtype.name for t in load_file(tmp_path / "out" / "rank0.safetensors").values()} == {numpy_dtype}
    assert json.loads((tmp_path / "out" / "config.json").read_text())["dtype"] == numpy_dtype


def test_tokenizer_files_are_copied(broken, tmp_path):
    for name in TOKENIZER_FILES:
        (broken / name).write_text(json.dumps({"name": name}))
    (broken / "notes.txt").touch()
    assert command(broken, tmp_path / "out") == 0
    assert {p.name for p in (tmp_path / "out").iterdir()} == {*TOKENIZER_FILES, "config.json", "rank0.safetensors"}
    for name in TOKENIZER_FILES:
        assert (tmp_path / "out" / name).read_text() == json.dumps({"name": name})


def test_a_checkpoint_is_replaced_whole(llama, tmp_path):
    out = tmp_path / "out"
    assert command(llama, out, tp_size=4) == 0
    assert command(out, tmp_path / "resharded", tp_size=1) == 0
    assert command(llama, out, tp_size=1) == 0
    assert sorted(p.name for p in out.glob("rank*")) == ["rank0.safetensors"]
    assert (out / "rank0.safetensors").read_bytes() == (tmp_path / "resharded" / "rank0.safetensors").read_bytes()


def test_interrupted_conversion_leaves_what_was_there(llama, tmp_path, monkeypatch):
    """Ctrl-C while writing weights, or while copying what stands beside them."""
    real = convert.SafetensorsWriter.write

    def write(self, name, array):
        if "layers.2" in name:
            raise KeyboardInterrupt
        real(self, name, array)

    def copy(source, output_dir):
        raise KeyboardInterrupt

    out = tmp_path / "out"
    with monkeypatch.context() as patch:
        patch.setattr(convert.SafetensorsWriter, "write", write)
        assert command(llama, out) == 130
    assert list(out.iterdir()) == []
    assert command(llama, out) == 0
    before = {p.name: p.read_bytes() for p in out.iterdir()}
    for target, name, stop in ((convert.SafetensorsWriter, "write", write), (convert, "copy_tokenizer_files", copy)):
        with monkeypatch.context() as patch:
            patch.setattr(target, name, stop)
            assert command(llama, out, tp_size=2) == 130
        assert {p.name: p.read_bytes() for p in out.iterdir()} == before
        assert [p.name for p in tmp_path.iterdir()] == ["out"]


def test_help_shows_defaults(capsys):
    with pytest.raises(SystemExit) as e:
        main(["--help"])
    assert e.value.code == 0
    text = " ".join(capsys.readouterr().out.split())
    for words in ("--model_dir", "--output_dir", "(default: 1)", "(default: auto)", "(default: info)"):
        assert words in text


@pytest.mark.parametrize(
    "argv", [[], ["--model_dir", "m"], ["--model_dir", "m", "--output_dir", "o", "--dtype", "int8"]], ids=str
)
def test_wrong_flags(argv, capsys):
    with pytest.raises(SystemExit) as e:
        main(argv)
    assert e.value.code == 2
    assert "usage: saw-convert" in capsys.readouterr().err


def no_config(folder: Path) -> str:
    (folder / "config.json").unlink()
    return "config.json"


def truncated(folder: Path) -> str:
    path = sorted(folder.glob("model-*.safetensors"))[1]
    path.write_bytes(path.read_bytes()[:-1])
    return path.name


def missing_shard(folder: Path) -> str:
    path = sorted(folder.glob("model-*.safetensors"))[1]
    path.unlink()
    return path.name


def unknown_architecture(folder: Path) -> str:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"architectures": ["PhiForCausalLM"]}))
    return "PhiForCausalLM"


def pickled(folder: Path) -> str:
    for path in folder.glob("model*"):
        path.unlink()
    (folder / "pytorch_model.bin").touch()
    return "pytorch_model.bin"


@pytest.mark.parametrize("damage", [no_config, truncated, missing_shard, unknown_architecture, pickled])
def test_bad_model(broken, tmp_path, capsys, damage):
    culprit = damage(broken)
    assert culprit in rejected(capsys, broken, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_missing_model(tmp_path, capsys):
    assert str(tmp_path / "nowhere") in rejected(capsys, tmp_path / "nowhere", tmp_path / "out")


@pytest.mark.parametrize(
    ("tp_size", "culprit"),
    [
        (3, "num_attention_heads 8"),
        (16, "num_attention_heads 8"),
        (0, "at least 1"),
        (-2, "at least 1"),
    ],
)
def test_tp_size_that_does_not_split(llama, tmp_path, capsys, tp_size, culprit):
    message = rejected(capsys, llama, tmp_path / "out", tp_size=tp_size)
    assert str(tp_size) in message
    assert culprit in message
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("fields", "tp_size", "culprit"),
    [
        ({"num_attention_heads": 12, "num_key_value_heads": 3}, 2, "num_key_value_heads 3"),
        ({"num_attention_heads": 12, "num_key_value_heads": 3}, 4, "num_key_value_heads 3"),
        ({"intermediate_size": 90}, 4, "intermediate_size 90"),
    ],
)
def test_heads_and_mlp_that_do_not_split(tmp_path, capsys, fields, tp_size, culprit):
    folder, _ = make_hf_model(tmp_path, "llama", **fields)
    assert culprit in rejected(capsys, folder, tmp_path / "out", tp_size=tp_size)


def test_output_below_a_file(llama, tmp_path, capsys):
    (tmp_path / "file").touch()
    assert str(tmp_path / "file" / "out") in rejected(capsys, llama, tmp_path / "file" / "out")


def test_output_that_fills_up(llama, tmp_path, capsys, monkeypatch):
    def write(self, name, array):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(convert.SafetensorsWriter, "write", write)
    message = rejected(capsys, llama, tmp_path / "out")
    assert str(tmp_path / "out") in message
    assert "No space left on device" in message
    assert list((tmp_path / "out").iterdir()) == []


def test_output_is_another_model(llama, broken, tmp_path, capsys):
    before = {p.name: p.read_bytes() for p in broken.iterdir()}
    assert str(broken) in rejected(capsys, broken, broken)
    assert str(broken) in rejected(capsys, llama, broken)
    (tmp_path / "link").symlink_to(broken)
    assert str(tmp_path / "link") in rejected(capsys, broken, tmp_path / "link")
    assert {p.name: p.read_bytes() for p in broken.iterdir()} == before


def test_weights_too_large_for_float16(tmp_path, capsys):
    folder, _ = make_hf_model(tmp_path, "qwen3", torch.float32)
    name = "model.layers.1.mlp.up_proj.weight"
    tensors = load_file(folder / "model.safetensors")
    tensors[name][3, 4] = 70000.0
    save_file(tensors, folder / "model.safetensors")
    message = rejected(capsys, folder, tmp_path / "out", dtype="float16", tp_size=2)
    assert f"{folder / 'model.safetensors'}: tensor {name!r}" in message
    assert "bfloat16" in message
    assert list((tmp_path / "out").iterdir()) == []
    assert command(folder, tmp_path / "out", dtype="bfloat16", tp_size=2) == 0
    assert np.isfinite(Checkpoint.open(tmp_path / "out").load("transformer.layers.1.mlp.gate.weight")).all()
