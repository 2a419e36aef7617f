"""Folders that are damaged, incomplete, of another kind or meant to do harm: one sentence each, and nothing leaks."""

from __future__ import annotations

import json
import os
import random
import shutil
import struct
import threading
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from benchmarks.common.record import check_writable
from saw_trtllm import LLM
from saw_trtllm.checkpoint import Checkpoint, save_checkpoint
from saw_trtllm.checkpoint.calibration import Calibration
from saw_trtllm.cli import build as saw_build
from saw_trtllm.cli import calibrate as saw_calibrate
from saw_trtllm.cli import convert as saw_convert
from saw_trtllm.cli import eval as saw_eval
from saw_trtllm.cli import run as saw_run
from saw_trtllm.cli import triton as saw_triton
from saw_trtllm.engine.config import EngineConfig
from saw_trtllm.errors import CheckpointError, ConfigError, SawError
from saw_trtllm.runtime.tokenizer import Tokenizer
from tests.support.example import EXAMPLE
from tests.support.models import make_hf_model
from tests.support.rejection import rejected

LFS_POINTER = "version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1234\n"
INDEX = "model.safetensors.index.json"


@pytest.fixture(scope="module")
def small(tmp_path_factory) -> Path:
    """A random Llama of three shards with a tokenizer's files, to copy and damage."""
    options = {"num_hidden_layers": 2, "vocab_size": 1024, "max_shard_size": "500KB"}
    folder = make_hf_model(tmp_path_factory.mktemp("small"), "llama", **options)[0]
    assert len(list(folder.glob("model-*"))) > 2
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copyfile(EXAMPLE / name, folder / name)
    return folder


@pytest.fixture
def model(small, tmp_path) -> Path:
    return Path(shutil.copytree(small, tmp_path / "model"))


def open_error(folder: Path) -> str:
    with pytest.raises(CheckpointError) as e:
        Checkpoint.open(folder)
    assert "\n" not in str(e.value)
    return str(e.value)


def edit(path: Path, **fields) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | fields))


def first_shard(folder: Path) -> Path:
    return min(folder.glob("model-*.safetensors"))


def join_shards(folder: Path, **changed) -> Path:
    """One file of all tensors, some of them changed, in place of the shards."""
    shards = sorted(folder.glob("model-*.safetensors"))
    tensors = {name: tensor for path in shards for name, tensor in load_file(path).items()}
    for path in (*shards, folder / INDEX):
        path.unlink()
    save_file(tensors | changed, folder / "model.safetensors", {"format": "pt"})
    return folder / "model.safetensors"


# What transformers loads


def test_the_index_may_name_what_nobody_needs(small, tmp_path):
    """A tied head and RoPE's tables are named by old exports' indexes, and no shard holds them."""
    folder, _ = make_hf_model(tmp_path, "llama", tie_word_embeddings=True, max_shard_size="300KB")
    index = json.loads((folder / INDEX).read_text())
    shard = first_shard(folder).name
    extra = {"lm_head.weight": shard, "model.layers.0.self_attn.rotary_emb.inv_freq": shard}
    edit(folder / INDEX, weight_map=index["weight_map"] | extra)
    ckpt = Checkpoint.open(folder)
    assert ckpt.config.share_embedding_table
    np.testing.assert_array_equal(ckpt.load("lm_head.weight"), ckpt.load("transformer.vocab_embedding.weight"))


def test_tables_of_rope_may_be_stored(model):
    join_shards(model, **{"model.layers.1.self_attn.rotary_emb.inv_freq": np.ones(32, np.float32)})
    assert Checkpoint.open(model).config.num_hidden_layers == 2


# Tensors


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("model.layers.0.self_attn.q_proj.weight_scale", "belongs to quantized weights"),
        ("model.layers.0.mlp.up_proj.qweight", "belongs to quantized weights"),
        ("model.layers.0.mlp.up_proj.weight.absmax", "belongs to quantized weights"),
        ("model.layers.0.self_attn.o_proj.bias", "none that a LlamaForCausalLM of 2 layers has"),
        ("model.layers.2.input_layernorm.weight", "none that a LlamaForCausalLM of 2 layers has"),
        ("score.weight", "none that a LlamaForCausalLM of 2 layers has"),
    ],
)
def test_a_tensor_without_a_place_is_rejected(model, tmp_path, name, words):
    path = join_shards(model, **{name: np.ones(4, np.float32)})
    assert f"{path}: tensor {name!r}" in (message := open_error(model))
    assert words in message


def test_a_tensor_without_a_place_in_a_tensorrt_llm_checkpoint(model, tmp_path):
    save_checkpoint(Checkpoint.open(model), tmp_path / "ckpt")
    path = tmp_path / "ckpt" / "rank0.safetensors"
    tensors = load_file(path)
    save_file(tensors | {"transformer.layers.0.attention.rotary_inv_freq": np.ones(4, np.float32)}, path)
    assert Checkpoint.open(tmp_path / "ckpt").config.num_hidden_layers == 2
    for name, words in (
        ("mlp.fc.weights_scaling_factor", "belongs to quantized weights"),
        ("mlp.fc.bias", "none that a"),
    ):
        save_file(tensors | {f"transformer.layers.0.{name}": np.ones(4, np.float32)}, path)
        assert words in open_error(tmp_path / "ckpt")


def test_one_dtype_for_q_k_and_v(model):
    name = "model.layers.1.self_attn.k_proj.weight"
    shape = (2 * 64, 96)
    path = join_shards(model, **{name: np.zeros(shape, np.float16)})
    assert f"{path}: tensor {name!r} is stored as float16" in open_error(model)


def test_weights_in_8_bits(model):
    """NumPy has no such dtype: the header is written by hand."""
    path = join_shards(model)
    raw = path.read_bytes()
    size = struct.unpack("<Q", raw[:8])[0]
    header = json.loads(raw[8 : 8 + size])
    name = "model.norm.weight"
    begin = header[name]["data_offsets"][0]
    header[name] |= {"dtype": "F8_E4M3", "data_offsets": [begin, begin + 96]}
    # What stood after it moves up, and so do the data.
    for other in header.values():
        if "data_offsets" in other and other["data_offsets"][0] > begin:
            other["data_offsets"] = [x - 288 for x in other["data_offsets"]]
    text = json.dumps(header).encode()
    data = raw[8 + size :]
    path.write_bytes(struct.pack("<Q", len(text)) + text + data[: begin + 96] + data[begin + 384 :])
    message = open_error(model)
    assert f"tensor {name!r} is stored as F8_E4M3, but F16, BF16 or F32 is needed" in message


# Numbers


@pytest.mark.parametrize(
    ("fields", "word"),
    [
        ({"num_hidden_layers": 10**8}, "num_hidden_layers"),
        (
            {"num_hidden_layers": 10**12, "architectures": ["MistralForCausalLM"], "sliding_window": 8},
            "num_hidden_layers",
        ),
        ({"max_position_embeddings": 10**8}, "max_position_embeddings"),
        ({"hidden_size": 10**400}, "hidden_size"),
        ({"vocab_size": 10**8}, "1024, 96"),
        ({"head_dim": 0}, "head_dim"),
        ({"num_key_value_heads": 0}, "num_key_value_heads"),
        *(({"rms_norm_eps": bad}, "rms_norm_eps") for bad in (0, -1e-6, float("nan"), float("inf"), 10**400, "1e-6")),
        *(({"rope_theta": bad, "rope_parameters": None}, "rope_theta") for bad in (0, -1.0, float("nan"), 10**400)),
        *(({"rope_scaling": {"type": "linear", "factor": bad}}, "factor") for bad in (0, -2, float("nan"), "2", None)),
        ({"rope_scaling": {"rope_type": "llama3"}}, "factor"),
        ({"rope_scaling": {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0}}, "high_freq_factor"),
        ({"rope_scaling": {"rope_type": "yarn", "factor": 2.0, "original_max_position_embeddings": 0}}, "original_max"),
        *(({"eos_token_id": bad}, "eos_token_id") for bad in ("2", 2.5, True, [2, None], [[2]], {"a": 2}, 10**30)),
        ({"bos_token_id": "<s>"}, "bos_token_id"),
    ],
    ids=str,
)
def test_numbers_that_no_model_has(model, tmp_path, capsys, fields, word):
    edit(model / "config.json", **fields)
    assert word in open_error(model)
    assert word in rejected(capsys, saw_build.main, "--model_dir", model, "--output_dir", tmp_path / "out")


@pytest.mark.parametrize(
    ("fields", "word"),
    [
        ({"num_hidden_layers": 10**8}, "num_hidden_layers"),
        ({"max_position_embeddings": 10**8}, "max_position_embeddings"),
        ({"norm_epsilon": 0}, "norm_epsilon"),
        ({"norm_epsilon": float("nan")}, "norm_epsilon"),
        ({"rotary_base": -1.0}, "rotary_base"),
        ({"rotary_base": float("nan")}, "rotary_base"),
        ({"rotary_scaling": {"type": "linear", "factor": 0}}, "factor"),
        ({"rotary_scaling": {"type": "yarn"}}, "factor"),
        ({"eos_token_id": "2"}, "eos_token_id"),
        ({"qk_layernorm": True}, "qk_layernorm"),
        ({"mapping": {"tp_size": 10**8, "world_size": 10**8}}, "tp_size"),
    ],
    ids=str,
)
def test_numbers_that_no_tensorrt_llm_model_has(model, tmp_path, fields, word):
    save_checkpoint(Checkpoint.open(model), tmp_path / "ckpt")
    edit(tmp_path / "ckpt" / "config.json", **fields)
    assert word in open_error(tmp_path / "ckpt")


@pytest.mark.parametrize("flag", ["--max_seq_len", "--max_num_tokens"])
def test_flags_that_no_engine_has(model, tmp_path, capsys, flag):
    edit(model / "config.json", rope_scaling={"type": "linear", "factor": 1e8})
    out = tmp_path / "out"
    assert flag[2:] in rejected(capsys, saw_build.main, "--model_dir", model, "--output_dir", out, flag, 10**8)


def test_a_table_of_positions_larger_than_the_memory(model, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(
        "saw_trtllm.backends.reference.backend.ReferenceBackend.free_memory", lambda self: 256 * 64 * 4 - 1
    )
    said = rejected(capsys, saw_build.main, "--model_dir", model, "--output_dir", tmp_path / "out")
    assert "max_seq_len 256 needs a RoPE table of 65,536 bytes" in said


@pytest.mark.parametrize(
    ("text", "word"),
    [
        ('{"hidden_size": ' + "9" * 5000 + "}", "a number has thousands of digits"),
        ('{"a": ' + "[" * 100_000 + "]" * 100_000 + "}", "recursion"),
        ('{"a": ' + "[" * 500 + "]" * 500 + "}", "nested deeper"),
        ('{"a": "\\ud83d"}', "surrogates not allowed"),
        (LFS_POINTER, "git lfs pull"),
    ],
    ids=["digits", "deep", "less deep", "half a pair", "pointer"],
)
@pytest.mark.parametrize("name", ["config.json", INDEX, "tokenizer_config.json"])
def test_json_that_nobody_wrote_by_hand(model, tmp_path, capsys, name, text, word):
    (model / name).write_text(text)
    said = rejected(capsys, saw_build.main, "--model_dir", model, "--output_dir", tmp_path / "out")
    assert str(model / name) in said
    assert word in said


# Folders of another kind


def adapter(folder: Path) -> str:
    shutil.rmtree(folder)
    folder.mkdir()
    (folder / "adapter_config.json").write_text('{"peft_type": "LORA"}')
    (folder / "adapter_model.safetensors").touch()
    return "merge_and_unload"


def gguf(folder: Path) -> str:
    shutil.rmtree(folder)
    folder.mkdir()
    (folder / "model.Q4_K_M.gguf").write_bytes(b"GGUF")
    return "GGUF file, which cannot be read"


def gguf_file(folder: Path) -> str:
    shutil.rmtree(folder)
    folder.write_bytes(b"GGUF")
    return "is not a folder"


def shards_without_index(folder: Path) -> str:
    (folder / INDEX).unlink()
    return f"download {INDEX} too"


def pointer_for_weights(folder: Path) -> str:
    first_shard(folder).write_text(LFS_POINTER)
    return f"{first_shard(folder)} is a Git LFS pointer, not the file itself: run git lfs pull"


def pointer_for_the_tokenizer(folder: Path) -> str:
    (folder / "tokenizer.json").write_text(LFS_POINTER)
    return f"{folder / 'tokenizer.json'} is a Git LFS pointer, not the file itself: run git lfs pull"


def folder_for_weights(folder: Path) -> str:
    first_shard(folder).unlink()
    (folder / "model-00001-of-00002.safetensors").mkdir()
    edit(folder / INDEX, weight_map={"model.norm.weight": "model-00001-of-00002.safetensors"})
    return "is a folder, but a regular file is needed"


@pytest.mark.parametrize(
    "kind",
    [
        adapter,
        gguf,
        gguf_file,
        shards_without_index,
        pointer_for_weights,
        pointer_for_the_tokenizer,
        folder_for_weights,
    ],
)
def test_a_folder_of_another_kind_is_told_what_it_is(model, tmp_path, capsys, kind):
    words = kind(model)
    assert words in rejected(capsys, saw_build.main, "--model_dir", model, "--output_dir", tmp_path / "out")


# Links and pipes


@pytest.mark.parametrize("outside", ["../other/model.safetensors", "{}/other/model.safetensors", "a/../../other/m"])
def test_the_index_stays_in_its_folder(model, outside):
    shutil.copytree(model, model.parent / "other")
    name = outside.format(model.parent)
    weight_map = json.loads((model / INDEX).read_text())["weight_map"]
    edit(model / INDEX, weight_map=weight_map | {"model.norm.weight": name})
    assert f"names {name!r}, which is outside its folder" in open_error(model)


@pytest.mark.parametrize("name", ["vocab.json", "tokenizer.json", "chat_template.jinja"])
def test_a_link_copies_nothing_from_outside(model, tmp_path, capsys, name):
    secret = tmp_path / "secret"
    secret.write_text((EXAMPLE / "tokenizer.json").read_text())
    (model / name).unlink(missing_ok=True)
    (model / name).symlink_to("../secret")
    for main in (saw_build.main, saw_convert.main):
        out = tmp_path / "out"
        said = rejected(capsys, main, "--model_dir", model, "--output_dir", out)
        assert f"{model / name} is a link to {secret}, outside the model's folder" in said
        assert not out.exists() or not list(out.iterdir())


def test_links_within_the_folder_and_to_the_hubs_cache_are_followed(model, tmp_path):
    """The hub's cache has nothing but links, from a snapshot to files that their hash names."""
    root = tmp_path / "models--org--name"
    (root / "blobs").mkdir(parents=True)
    snapshot = root / "snapshots" / ("0" * 40)
    snapshot.mkdir(parents=True)
    for i, path in enumerate(sorted(model.iterdir())):
        blob = root / "blobs" / (f"{i:040x}" if path.suffix == ".json" else f"{i:064x}")
        shutil.move(path, blob)
        (snapshot / path.name).symlink_to(f"../../blobs/{blob.name}")
    (snapshot / "special_tokens_map.json").symlink_to("tokenizer_config.json")
    # The cache's own folder may be reached by a link too.
    (tmp_path / "link").symlink_to(snapshot)
    for folder in (snapshot, tmp_path / "link"):
        out = tmp_path / f"engine of {folder.name}"
        assert saw_build.main(["--model_dir", str(folder), "--output_dir", str(out)]) == 0
        copied = out / "tokenizer.json"
        assert not copied.is_symlink()
        assert copied.read_bytes() == (EXAMPLE / "tokenizer.json").read_bytes()
        assert (out / "special_tokens_map.json").read_bytes() == (EXAMPLE / "tokenizer_config.json").read_bytes()


@pytest.mark.parametrize(
    "name", ["config.json", INDEX, "model-00001-of-00002.safetensors", "tokenizer.json", "generation_config.json"]
)
def test_a_pipe_is_not_waited_for(model, tmp_path, capsys, name):
    edit(model / INDEX, weight_map={"model.norm.weight": "model-00001-of-00002.safetensors"} if "0001" in name else {})
    if name not in ("config.json", INDEX) and "0001" not in name:
        shutil.copyfile(model / INDEX, tmp_path / "index")
        join_shards(model)
    (model / name).unlink(missing_ok=True)
    os.mkfifo(model / name)
    said = []
    argv = ("--model_dir", model, "--output_dir", tmp_path / "out")
    # In a thread, so that a reader that waits fails this test instead of stopping all of them.
    thread = threading.Thread(target=lambda: said.append(rejected(capsys, saw_build.main, *argv)), daemon=True)
    thread.start()
    thread.join(60)
    assert said
    assert f"{model / name} is a pipe, a device or a socket, but a regular file is needed" in said[0]


# Another user's folders


@pytest.fixture
def forbidden(monkeypatch):
    """Make what is at or below a folder look as it does to a user who has no rights there: tests may run as root."""
    hidden: list[str] = []
    real = os.stat

    def stat(path, *args, **kwargs):
        if isinstance(path, str | os.PathLike) and any(os.fspath(path).startswith(h) for h in hidden):
            raise PermissionError(13, "Permission denied", str(path))
        return real(path, *args, **kwargs)

    monkeypatch.setattr(os, "stat", stat)
    return hidden


COMMANDS = {
    "saw-build": (saw_build.main, ["--model_dir", "{}", "--output_dir", "out"]),
    "saw-build --calibration": (saw_build.main, ["--model_dir", EXAMPLE, "--calibration", "{}/c"]),
    "saw-convert": (saw_convert.main, ["--model_dir", "{}", "--output_dir", "out"]),
    "saw-run": (saw_run.main, ["--engine_dir", "{}", "--input_text", "x"]),
    "saw-triton": (saw_triton.main, ["--engine_dir", "{}"]),
    "saw-eval": (saw_eval.main, ["--model_dir", "{}", "--text", "t"]),
    "saw-calibrate": (saw_calibrate.main, ["--model_dir", "{}", "--text", "t", "--output", "c"]),
    "saw-calibrate --output": (saw_calibrate.main, ["--model_dir", EXAMPLE, "--text", "t", "--output", "{}/c"]),
}


@pytest.mark.parametrize("below", ["", "/config.json"])
@pytest.mark.parametrize("command", COMMANDS)
def test_a_folder_that_may_not_be_read(engine, tmp_path, capsys, monkeypatch, forbidden, command, below):
    monkeypatch.chdir(tmp_path)
    folder = Path(shutil.copytree(engine("saw_int4"), tmp_path / "theirs"))
    main, argv = COMMANDS[command]
    forbidden.append(str(folder) + (below if "--calibration" not in command and "--output" not in command else ""))
    said = rejected(capsys, main, *(str(a).format(folder) for a in argv))
    assert "may not be looked at by this user: ask its owner" in said


@pytest.mark.parametrize("open_", [Checkpoint.open, EngineConfig.load, Tokenizer.load, LLM, Calibration.load])
def test_the_library_says_what_may_not_be_read(tmp_path, forbidden, open_):
    forbidden.append(str(tmp_path / "theirs"))
    with pytest.raises(SawError, match="may not be looked at by this user"):
        open_(tmp_path / "theirs")


def test_a_record_in_a_folder_that_may_not_be_looked_at(tmp_path, monkeypatch, forbidden):
    forbidden.append(str(tmp_path / "theirs" / "x"))
    (tmp_path / "theirs").mkdir()
    monkeypatch.setattr(os, "access", lambda path, mode: Path(path) != tmp_path / "theirs")
    with pytest.raises(ConfigError, match="cannot be written"):
        check_writable(tmp_path / "theirs" / "x" / "record.json")


def test_a_file_that_may_not_be_read(model, tmp_path, capsys, monkeypatch):
    real = os.access
    monkeypatch.setattr(os, "access", lambda path, *a, **k: Path(path).name != "tokenizer.json" and real(path, *a, **k))
    said = rejected(capsys, saw_build.main, "--model_dir", model, "--output_dir", tmp_path / "out")
    assert f"{model / 'tokenizer.json'} may not be read by this user" in said


# Whatever else


VALUES = (None, True, -1, 0, 1, 7, 2**31, 2**63, 10**400, 0.5, -0.0, float("nan"), float("inf"), "", "x", "\ud800")
VALUES += ([], [None], [[]], {}, {"a": 1}, {"rope_type": "yarn"}, {"factor": 0}, ["sliding_attention"], "../x", "silu")


def mutate(rng: random.Random, value):
    """Change one place of a JSON value: another value, a key less, one more, or two exchanged."""
    if isinstance(value, dict | list) and value and rng.random() < 0.85:
        copy = value.copy()
        key = rng.choice(list(copy)) if isinstance(copy, dict) else rng.randrange(len(copy))
        kind = rng.random()
        if kind < 0.15:
            del copy[key]
        elif kind < 0.25 and isinstance(copy, dict):
            other = rng.choice(list(copy))
            copy[key], copy[other] = copy[other], copy[key]
        elif kind < 0.3 and isinstance(copy, dict):
            copy[str(rng.choice(VALUES))] = rng.choice(VALUES)
        else:
            copy[key] = mutate(rng, copy[key])
        return copy
    if isinstance(value, int) and rng.random() < 0.3:
        return value + rng.choice([-1, 1, 64, 2**20, -(2**20)])
    return rng.choice(VALUES)


def read_all(folder: Path) -> None:
    ckpt = Checkpoint.open(folder)
    for name in ckpt.names():
        ckpt.load(name)
    ckpt.config.model_dump_json()


def opens_or_says_why(open_, folder: Path) -> bool:
    """Whether it opens; anything but a one-line SawError fails the test."""
    try:
        open_(folder)
        message = ""
    except SawError as e:
        message = str(e)
    assert "\n" not in message, message
    return not message


@pytest.mark.parametrize("format_", ["huggingface", "tensorrt_llm"])
def test_mutated_configs_open_or_say_why(model, tmp_path, format_):
    folder = model
    if format_ == "tensorrt_llm":
        folder = tmp_path / "ckpt"
        save_checkpoint(Checkpoint.open(model), folder, tp_size=2)
    rng, path = random.Random(1), folder / "config.json"
    original = json.loads(path.read_text())
    scaling = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
    original["rope_scaling" if format_ == "huggingface" else "rotary_scaling"] = scaling
    opened = 0
    for _ in range(400):
        value = original
        for _ in range(rng.randint(1, 3)):
            value = mutate(rng, value)
        path.write_text(json.dumps(value))
        opened += opens_or_says_why(read_all, folder)
    assert 0 < opened < 400


def test_mutated_engine_configs_load_or_say_why(engine, tmp_path):
    original = json.loads((engine("saw_int4") / "config.json").read_text())
    rng, loaded = random.Random(4), 0
    for _ in range(300):
        (tmp_path / "config.json").write_text(json.dumps(mutate(rng, original)))
        loaded += opens_or_says_why(lambda folder: EngineConfig.load(folder).model_dump_json(), tmp_path)
    assert 0 < loaded < 300


def test_mutated_indexes_open_or_say_why(model):
    rng, path = random.Random(2), model / INDEX
    original = json.loads(path.read_text())
    for _ in range(200):
        path.write_text(json.dumps(mutate(rng, original)))
        opens_or_says_why(read_all, model)


def test_mutated_weights_open_or_say_why(model):
    """Headers that are JSON and say something else, and single bytes of the header and of the length before it."""
    rng, path = random.Random(3), join_shards(model)
    raw = path.read_bytes()
    size = struct.unpack("<Q", raw[:8])[0]
    header, data = json.loads(raw[8 : 8 + size]), raw[8 + size :]
    for i in range(400):
        if i % 2:
            text = json.dumps(mutate(rng, header)).encode()
            path.write_bytes(struct.pack("<Q", len(text)) + text + data)
        else:
            damaged = bytearray(raw)
            damaged[rng.randrange(8 + size)] = rng.randrange(256)
            path.write_bytes(damaged)
        opens_or_says_why(read_all, model)
