"""Ctrl-C while a command is still being imported."""

import os
import pkgutil
import subprocess
import sys

import pytest

from saw_trtllm import cli

#: Of a sitecustomize.py, which Python imports first of all: Ctrl-C comes when a module is looked for.
INTERRUPT = """
import os, signal, sys

class Finder:
    def find_spec(name, path=None, target=None):
        if name == os.environ["INTERRUPTED"]:
            signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background job would ignore it
            signal.raise_signal(signal.SIGINT)

sys.meta_path.insert(0, Finder)
"""

MODULES = sorted({m.name for m in pkgutil.iter_modules(cli.__path__)} - {"common", "conversation"})
COMMANDS = {
    **{
        f"saw-{name}": ["-c", f"import sys; from saw_trtllm.cli.{name} import main; sys.exit(main())"]
        for name in MODULES
    },
    "python -m saw_trtllm.cli.build": ["-m", "saw_trtllm.cli.build"],
    "python -m benchmarks": ["-m", "benchmarks"],
}


@pytest.mark.parametrize("command", COMMANDS)
def test_a_command_that_is_interrupted_while_it_is_imported_says_nothing(command, tmp_path):
    (tmp_path / "sitecustomize.py").write_text(INTERRUPT, encoding="utf-8")
    paths = os.pathsep.join([str(tmp_path), *sys.path])
    done = subprocess.run(
        [sys.executable, *COMMANDS[command]],
        env={**os.environ, "PYTHONPATH": paths, "INTERRUPTED": "pydantic"},
        capture_output=True,
        timeout=120,
    )
    assert (done.returncode, done.stdout, done.stderr) == (130, b"", b"")


def test_other_errors_of_an_import_are_shown(tmp_path):
    (tmp_path / "pydantic.py").write_text("raise ZeroDivisionError", encoding="utf-8")
    paths = os.pathsep.join([str(tmp_path), *sys.path])
    command = [sys.executable, *COMMANDS["saw-build"]]
    done = subprocess.run(command, env={**os.environ, "PYTHONPATH": paths}, capture_output=True, timeout=120)
    assert done.returncode == 1
    assert done.stderr.endswith(b"ZeroDivisionError\n")
