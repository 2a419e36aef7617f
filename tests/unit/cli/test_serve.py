"""``saw-serve`` as a user types it."""

import gc
import os
import signal
import socket
import subprocess
import sys
from types import SimpleNamespace

import httpx
import openai
import pytest

from saw_trtllm.cli import serve as saw_serve
from tests.support.example import EXAMPLE
from tests.support.rejection import rejected


def test_one_command_from_a_checkpoint_to_answers_and_back(tmp_path):
    """In a process of its own: what it says, that it answers, and that it ends when it is told to."""
    flags = ["--max_batch_size", "4", "--max_seq_len", "256", "--kv_cache_max_tokens", "1024", "--port", "0"]
    command = [sys.executable, "-m", "saw_trtllm.cli.serve", str(EXAMPLE), "--backend", "reference", *flags]
    command += ["--no_cache", "--served_model_name", "tiny", "--api_key", "secret"]
    command += ["--timeout_graceful_shutdown", "120"]  # a machine that does much else
    environment = {**os.environ, "TMPDIR": str(tmp_path)}
    errors = tmp_path.with_suffix(".err")
    with (
        errors.open("w") as log,
        subprocess.Popen(command, stdout=subprocess.PIPE, stderr=log, text=True, env=environment) as server,
    ):
        announced, ready = server.stdout.readline(), server.stdout.readline()
        assert "tokens will fit" in announced
        assert announced.endswith("; the engine is being built\n")
        url = ready.split()[1]
        assert ready.startswith(f"ready: {url} serves tiny;")
        client = openai.OpenAI(base_url=f"{url}/v1", api_key="secret")
        # Greedy and without an end: no draw makes the first piece the last.
        greedy = {"temperature": 0, "extra_body": {"ignore_eos": True}}
        stream = client.completions.create(model="tiny", prompt="def f(", max_tokens=200, stream=True, **greedy)
        assert next(iter(stream)).choices[0].text
        assert httpx.get(f"{url}/health", timeout=60).status_code == 200
        server.send_signal(signal.SIGTERM)
        list(stream)  # what has begun is finished
        assert server.wait(180) == 0
    assert list(tmp_path.iterdir()) == []
    assert errors.read_text().count("the 4-bit cache has no calibration") == 1


@pytest.mark.parametrize(
    ("argv", "said"),
    [
        ([], "there is nothing to serve: give a model, or --engine_dir"),
        (["--engine_dir", "/nowhere"], "/nowhere is not a folder: give the --output_dir of saw-build"),
        (
            ["/nowhere"],
            "/nowhere is not a folder: give a Hugging Face folder, the --output_dir of saw-build, or a name",
        ),
        (["no/model"], "is no folder, and "),
        (["--engine_dir", "a/x", "--engine_dir", "b/x"], "two engines are called x: give each a --served_model_name"),
        (["--engine_dir", "x", "--served_model_name", "a", "--served_model_name", "b"], "2 names came for 1 engines"),
        (["x", "--cache_size", "nan"], "--cache_size is nan: give the GiB"),
        (["x", "--cache_size", "inf"], "--cache_size is inf: give the GiB"),
        (["x", "--cache_size", "-1"], "--cache_size is -1.0: give the GiB"),
        (["--engine_dir", "x", "--kv", "fp16"], "--kv says how an engine is built, and x is one already: leave it out"),
        (["--engine_dir", "x", "--kv", "saw_int4"], "--kv says how an engine is built, and x is one already"),
        (["--engine_dir", "x", "--gemm_plugin", "auto"], "--gemm_plugin says how an engine is built, and x is one"),
    ],
)
def test_what_cannot_be_served(argv, said, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    assert said in rejected(capsys, saw_serve.main, *argv)


def test_whoever_read_its_first_line_may_have_gone(engine, capsys, monkeypatch):
    """As ``| head -1`` does: the server goes on."""
    ran = []
    server = SimpleNamespace(run=ran.append)
    monkeypatch.setattr(saw_serve, "make_server", lambda *_: server)
    reading, writing = os.pipe()
    os.close(reading)
    with open(writing, "w") as stdout:
        monkeypatch.setattr(sys, "stdout", stdout)
        argv = ["--engine_dir", str(engine("saw_int4")), "--kv_cache_max_tokens", "256", "--port", "0"]
        try:
            assert saw_serve.main(argv) == 0
        finally:
            gc.unfreeze()  # a server's process leaves out of collections what it began with, these tests' need not
    [[socket]] = ran
    socket.close()


def test_a_port_that_is_taken(engine, capsys):
    with socket.create_server(("127.0.0.1", 0)) as other:
        flags = ["--kv_cache_max_tokens", "256", "--port", str(other.getsockname()[1])]
        said = rejected(capsys, saw_serve.main, "--engine_dir", engine("saw_int4"), *flags)
    assert "cannot be listened on (Address already in use" in said


@pytest.mark.parametrize("key", ["", " secret"])
def test_a_key_that_is_none_protects_nothing(key, capsys):
    """``--api_key $KEY`` where KEY is not set: everybody would have sent that key."""
    assert "an API key is empty" in rejected(capsys, saw_serve.main, "--engine_dir", "x", "--api_key", key)


def test_a_template_of_ones_own(engine, tmp_path, capsys):
    flags = ["--engine_dir", engine("saw_int4"), "--kv_cache_max_tokens", "256", "--chat_template"]
    assert "does not exist: give a file that holds a chat template" in rejected(
        capsys, saw_serve.main, *flags, tmp_path / "none"
    )
    broken = tmp_path / "broken.jinja"
    broken.write_text("{% for %}")
    assert "the chat template cannot be read" in rejected(capsys, saw_serve.main, *flags, broken)
