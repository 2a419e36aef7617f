"""An engine's checksums: recorded by a build, compared by whoever opens the engine."""

import hashlib
import json
import shutil

import pytest

from benchmarks.common.ports import free_ports
from saw_trtllm import LLM
from saw_trtllm.cli import run as saw_run
from saw_trtllm.cli import triton as saw_triton
from saw_trtllm.engine.config import EngineConfig
from saw_trtllm.engine.executor_view import for_executor
from saw_trtllm.errors import EngineError
from saw_trtllm.plan import checksums
from saw_trtllm.plan.checksums import file_checksum, record_checksums, verify_engine
from tests.support.example import EXAMPLE
from tests.support.rejection import rejected


@pytest.fixture
def folder(engine, tmp_path):
    return shutil.copytree(engine("saw_int4"), tmp_path / "engine")


def flip(path, offset):
    data = bytearray(path.read_bytes())
    data[offset] ^= 1
    path.write_bytes(data)


def test_a_file_is_hashed_in_pieces(tmp_path, monkeypatch):
    monkeypatch.setattr(checksums, "_PIECE", 4)
    data = b"abcdefghij"
    (tmp_path / "file").write_bytes(data)
    pieces = b"".join(hashlib.sha256(piece).digest() for piece in (b"abcd", b"efgh", b"ij"))
    assert file_checksum(tmp_path / "file") == hashlib.sha256(pieces).hexdigest()


@pytest.mark.parametrize(
    ("name", "offset"), [("rank0.engine", -1), ("rank0.engine", 4000), ("tokenizer.json", 700), ("config.json", None)]
)
def test_one_flipped_bit_is_one_sentence(name, offset, folder, tmp_path, capsys):
    if offset is None:  # in a number, of 64 positions
        text = (folder / name).read_text()
        number = text.index('"max_num_tokens": 4096') + len('"max_num_tokens": ')
        flip(folder / name, len(text[:number].encode()))
    else:
        flip(folder / name, offset)
    said = rejected(capsys, saw_run.main, "--engine_dir", folder, "--input_text", "x")
    assert f"{name} is not as saw-build wrote it" in said
    repository = tmp_path / "repository"
    argv = ["--engine_dir", folder, "--model_repo", repository, "--launch"]
    for name, port in zip(("http", "grpc", "metrics"), free_ports(3), strict=True):
        argv += [f"--{name}_port", port]
    assert rejected(capsys, saw_triton.main, *argv) == said
    assert not repository.exists()
    with pytest.raises(EngineError, match="is not as saw-build wrote it"):
        LLM(folder)


def test_the_check_can_be_left_out(folder, tmp_path, capsys):
    flip(folder / "rank0.engine", -1)
    with LLM(folder, verify=False):
        pass
    argv = ["--engine_dir", str(folder), "--no_verify"]
    assert saw_run.main([*argv, "--input_text", "fox", "--max_output_len", "2"]) == 0
    assert saw_triton.main([*argv, "--model_repo", str(tmp_path / "repository")]) == 0
    text = (tmp_path / "repository" / "tensorrt_llm" / "config.pbtxt").read_text()
    assert text[text.index('"verify_engine"') :].split("string_value")[1].split('"')[1] == "false"
    capsys.readouterr()


@pytest.mark.parametrize("launch", [False, True])
def test_a_server_has_its_engine_checked_once(launch, folder, tmp_path, monkeypatch):
    """By the command before it starts the server, or by the model when somebody starts one later."""
    checked = []
    monkeypatch.setattr(saw_triton, "verify_engine", lambda *_, **__: checked.append("command"))
    argv = ["--engine_dir", str(folder), "--model_repo", str(tmp_path / "repository"), *["--launch"] * launch]
    parameters = saw_triton._parameters(saw_triton.make_parser().parse_args(argv))
    assert (checked, parameters.verify_engine) == ((["command"], False) if launch else ([], True))


def test_files_that_are_missing_or_another_engines(folder):
    (folder / "tokenizer_config.json").rename(folder / "other")
    verify_engine(folder, tokenizer=False)
    with pytest.raises(EngineError, match=r"tokenizer_config\.json cannot be read"):
        verify_engine(folder)
    with LLM(folder, tokenizer=EXAMPLE):
        pass


def test_an_engine_without_checksums_opens(folder):
    config = EngineConfig.load(folder)
    assert {"config.json", "rank0.engine", "tokenizer.json"} <= config.saw_int4.checksums.keys()
    config.save(folder)
    assert "checksums" not in json.loads((folder / "config.json").read_text())["saw_int4"]
    with LLM(folder):
        pass


def test_the_section_of_a_tensorrt_llm_engine_is_found(folder):
    config = json.loads((folder / "config.json").read_text())
    config["pretrained_config"] = for_executor(config["pretrained_config"] | {"saw_int4": config.pop("saw_int4")})
    (folder / "config.json").write_text(json.dumps(config))
    record_checksums(folder)
    verify_engine(folder)
    flip(folder / "rank0.engine", -1)
    with pytest.raises(EngineError, match=r"rank0\.engine is not as"):
        verify_engine(folder)


def test_an_engine_that_is_replaced_while_it_is_opened(folder, monkeypatch):
    """The files of two engines must not pass for one, whether checksums are compared or not."""
    real = checksums.file_checksum

    def replace(path):
        config = json.loads((folder / "config.json").read_text())
        config["saw_int4"]["checksums"]["rank0.engine"] = "another"
        (folder / "config.json").write_text(json.dumps(config))
        return real(path) + "0"

    monkeypatch.setattr(checksums, "file_checksum", replace)
    with pytest.raises(EngineError, match="was replaced while it was opened: open it again"):
        verify_engine(folder)
