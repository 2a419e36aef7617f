"""What fails while it is read is said to be so, by its name, and not what is written meanwhile."""

import errno
import os
import shutil
import sys
from pathlib import Path

import pytest

from benchmarks.common import report
from saw_trtllm.backends.tensorrt.build import _use_timing_cache
from saw_trtllm.checkpoint import Checkpoint
from saw_trtllm.cli import convert as saw_convert
from saw_trtllm.cli import run as saw_run
from saw_trtllm.cli import serve as saw_serve
from saw_trtllm.errors import CheckpointError, ConfigError
from saw_trtllm.paths import copy_file, read_json
from saw_trtllm.plan import checksums
from saw_trtllm.plan.tensorrt_options import NetworkOptions
from saw_trtllm.plan.weights import EngineWeights
from tests.support.example import EXAMPLE
from tests.support.rejection import rejected

#: A regular file that may be opened, and of which nothing can be read: EIO.
BROKEN = "/proc/self/mem"


@pytest.fixture
def broken(monkeypatch):
    """Have files with a name fail while they are read."""

    def broken(name):
        opened = Path.open

        def open_(path, *args, **options):
            reads = path.name == name and (args or ["r"])[0].startswith("r")
            return opened(Path(BROKEN) if reads else path, *args, **options)

        monkeypatch.setattr(Path, "open", open_)

    return broken


@pytest.fixture
def model(tmp_path):
    return shutil.copytree(EXAMPLE, tmp_path / "model")


@pytest.mark.parametrize("name", ["config.json", "tokenizer.json"])
def test_a_checkpoint_that_cannot_be_read_is_not_an_output_that_cannot_be_written(
    name, model, broken, tmp_path, capsys
):
    broken(name)
    said = rejected(capsys, saw_convert.main, "--model_dir", model, "--output_dir", tmp_path / "out")
    assert f"{model / name} cannot be read" in said
    assert os.strerror(errno.EIO) in said


def test_checksums_of_weights_that_cannot_be_read(model, monkeypatch, tmp_path, capsys):
    def pread(*_):
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    checkpoint = Checkpoint.open(model)
    monkeypatch.setattr(checksums.os, "pread", pread)
    with pytest.raises(CheckpointError, match=r"config\.json cannot be read \(Input/output error\)"):
        EngineWeights.source(type("Of", (), {"checkpoint": checkpoint}))
    said = rejected(capsys, saw_serve.main, model, "--backend", "reference", "--cache_dir", tmp_path / "cache")
    assert f"{model}/" in said
    assert "cannot be read (Input/output error)" in said


def test_what_is_typed_cannot_be_read(engine, monkeypatch, capsys):
    with open(BROKEN) as stdin:
        monkeypatch.setattr(sys, "stdin", stdin)
        said = rejected(capsys, saw_run.main, "--engine_dir", engine("saw_int4"), "--chat")
    assert "stdin cannot be read (Input/output error)" in said


def test_a_timing_cache_and_a_document_that_cannot_be_read(broken, tmp_path):
    with pytest.raises(ConfigError, match="/proc/self/mem cannot be read"):
        _use_timing_cache(None, NetworkOptions(input_timing_cache=Path(BROKEN)))
    (tmp_path / "docs").mkdir()
    (tmp_path / "README.md").touch()
    broken("README.md")
    with pytest.raises(ConfigError, match=r"README\.md cannot be read"):
        list(report.write(tmp_path / "docs", {}))


def test_a_copy_says_which_of_the_two_fails(tmp_path):
    (tmp_path / "whole").write_bytes(b"x" * 5)
    copy_file(tmp_path / "whole", tmp_path / "copy")
    assert (tmp_path / "copy").read_bytes() == b"x" * 5
    with pytest.raises(ConfigError, match="/proc/self/mem cannot be read"):
        copy_file(Path(BROKEN), tmp_path / "copy")
    with pytest.raises(OSError, match="No space left"):
        copy_file(tmp_path / "whole", Path("/dev/full"))


def test_a_json_file_that_cannot_be_read():
    with pytest.raises(ConfigError, match=r"/proc/self/mem cannot be read as JSON: \[Errno 5\]"):
        read_json(Path(BROKEN))
