"""The scripts that a newcomer runs first: what they say where something is missing, and at their end."""

from __future__ import annotations

import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.support import ROOT

SCRIPTS = ROOT / "build_scripts"


@pytest.fixture
def run(tmp_path):
    """Run a script of a copy of the project's, with nothing on PATH but the tools it needs and the Pythons given."""
    tools = tmp_path / "tools"
    tools.mkdir()
    needed = "bash cat chmod cksum df dirname grep mkdir mktemp rm sed sleep tail tr"
    for tool in needed.split():
        (tools / tool).symlink_to(shutil.which(tool))
    shutil.copytree(SCRIPTS, tmp_path / "build_scripts")
    shutil.copy(ROOT / "pyproject.toml", tmp_path)

    def run_(script, *, pythons, **environment):
        for name, text in pythons.items():
            (tools / name).write_text(f"#!{shutil.which('bash')}\n{text}\n")
            (tools / name).chmod(0o755)
        command = [shutil.which("bash"), str(tmp_path / "build_scripts" / script)]
        environment = {"PATH": str(tools)} | environment
        return subprocess.run(command, env=environment, capture_output=True, text=True, check=False, timeout=60)

    return run_


@pytest.mark.skipif(shutil.which("cmake") is None, reason="cmake is not installed")
@pytest.mark.parametrize(
    ("gpus", "codes", "architectures"),
    [
        ("9.0\n8.6\n9.0", "", "90a;86"),
        (None, "sm_80 sm_90a sm_100 sm_120", "80;90a-real;100-real;120-real"),
        (None, "sm_80 sm_90a", "80;90a-real"),
    ],
)
def test_kernels_are_compiled_for_this_machines_gpu_or_for_all(gpus, codes, architectures, tmp_path):
    """nvidia-smi exits with 9 where there is no GPU."""
    for name, text in (("nvidia-smi", "exit 9" if gpus is None else f"echo '{gpus}'"), ("nvcc", f"echo {codes}")):
        (tmp_path / name).write_text(f"#!{shutil.which('bash')}\n{text}\n")
        (tmp_path / name).chmod(0o755)
    command = [shutil.which("cmake"), "-P", str(ROOT / "plugins" / "cmake" / "architectures.cmake")]
    environment = {"PATH": str(tmp_path), "CUDACXX": str(tmp_path / "nvcc")}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True, timeout=60)
    assert done.stdout.strip().endswith(f"Compiling for the GPU architectures {architectures}")


def python_with(change: str) -> str:
    """A Python that has something changed before it runs what it is given on stdin."""
    program = f"import sys, sysconfig; {change}; exec(sys.stdin.read())"
    return f"exec {shlex.quote(sys.executable)} -c {shlex.quote(program)}"


WHOLE = python_with("pass")
NO_LIBRARY = python_with("sysconfig.get_config_vars().update(LIBDIR='/x', MULTIARCH='x'); sys.base_prefix = '/x'")
NO_PIP = python_with("sys.modules['ensurepip'] = None")
OLD = python_with("sys.version_info = (3, 9, 1)")


@pytest.mark.parametrize(
    ("pythons", "message"),
    [
        ({}, "no Python 3.10, 3.11 or 3.12 was found: install one"),
        ({"python3": OLD, "python3.12": "exit 1"}, "no Python 3.10, 3.11 or 3.12 was found: install one"),
        ({"python3": NO_LIBRARY}, "/python3 has no shared library, which Triton loads: "),
        ({"python3": OLD, "python3.11": NO_PIP}, "/python3.11 has no ensurepip: "),
    ],
)
def test_a_python_that_will_not_do_is_one_sentence(pythons, message, run):
    done = run("test", pythons=pythons)
    assert (done.returncode, done.stdout) == (2, "")
    (line,) = done.stderr.splitlines()
    assert line.startswith("error: ")
    assert message in line


def test_the_first_python_that_will_do_is_taken(run):
    done = run("find_python", pythons={"python3": NO_LIBRARY, "python3.12": NO_PIP, "python3.10": WHOLE})
    assert (done.returncode, done.stderr) == (0, "")
    assert Path(done.stdout.strip()).name == "python3.10"


#: Makes a .venv whose pip takes a few seconds.
PIP = """
[[ "$1" == - ]] && exit
[[ "$1" == --version ]] && echo Python 3.11.7 && exit
mkdir -p "$4/bin"
echo "#!$BASH" > "$4/bin/pip"
echo 'echo Collecting torch; echo noise; sleep 5; [[ -z "$FAILS" ]] || { echo ERROR: disk; exit 1; }' >> "$4/bin/pip"
chmod 755 "$4/bin/pip"
"""


@pytest.mark.parametrize("fails", [False, True])
def test_pip_is_neither_silent_nor_noisy(fails, run):
    """And what follows says how long it takes; here there is no ruff."""
    done = run("test", pythons={"python3": PIP}, **({"FAILS": "1"} if fails else {}))
    first, progress, then, *_ = done.stderr.splitlines()
    assert re.fullmatch(r"== making \.venv with Python 3\.11\.7: about \d+ minutes, \d+ GB", first)
    assert re.fullmatch(r" +\d+ s: Collecting torch", progress)
    assert re.fullmatch("ERROR: disk" if fails else r"== lint and all tests: about \d+ minutes on two cores", then)
    assert done.returncode == (1 if fails else 127)


def test_a_disk_without_room_is_one_sentence_before_pip_begins(run, tmp_path):
    full = tmp_path / "tools" / "df"
    full.unlink()
    full.write_text(f"#!{shutil.which('bash')}\necho header; [[ $1 == *target ]] && echo / || echo ' 8900'\n")
    full.chmod(0o755)
    done = run("environment.sh", pythons={"python3": PIP})
    assert done.returncode == 2
    assert done.stderr.splitlines()[1:] == [
        "error: 8900 MB are free on /, and making .venv takes 10000 MB, of which 6000 stay: free some"
    ]


def test_skips_are_folded_and_the_last_line_is_pytests(tmp_path):
    (tmp_path / "test_it.py").write_text(
        "import pytest\n"
        "@pytest.mark.parametrize('i', range(7))\n"
        "def test_gpu(i): pytest.skip('there is no GPU')\n"
        "@pytest.mark.skip(reason='there is no GPU')\n"
        "def test_other(): pass\n"
        "@pytest.mark.skip(reason='there is no TensorRT')\n"
        "def test_engine(): pass\n"
        "@pytest.mark.xfail(reason='known')\n"
        "def test_known(): assert False\n"
        "def test_bad(): assert False\n"
    )
    (tmp_path / "test_module.py").write_text(
        "import pytest\npytest.skip('there is no TensorRT', allow_module_level=True)"
    )
    options = re.search(r'addopts = \["(-r\w+)"', (ROOT / "pyproject.toml").read_text())[1]
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-q",
        "-p",
        "tests.support.fold_skips",
        "-p",
        "no:cacheprovider",
        options,
        "-c",
        os.devnull,
    ]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [*command, "-c", os.devnull, "--rootdir", tmp_path, tmp_path],
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    lines = done.stdout.splitlines()
    assert [line for line in lines if line.startswith("SKIPPED")] == [
        "SKIPPED [8] there is no GPU",
        "SKIPPED [2] there is no TensorRT",
    ]
    assert any(line.startswith("FAILED") and "test_bad" in line for line in lines)
    assert any(line.startswith("XFAIL") and "known" in line for line in lines)
    assert lines[-1].startswith("1 failed, 10 skipped, 1 xfailed in ")


@pytest.mark.triton
def test_the_demo_ends_with_a_command_that_works():
    stamp = ROOT / ".venv" / "stamp"
    now = subprocess.run(
        ["cksum"], input=(ROOT / "pyproject.toml").read_bytes(), capture_output=True, check=True
    ).stdout
    if not stamp.is_file() or stamp.read_bytes() != now:
        pytest.skip(".venv was not made by build_scripts/environment.sh")
    demo = subprocess.run([SCRIPTS / "demo"], capture_output=True, text=True, check=False, timeout=250)
    assert demo.returncode == 0, demo.stderr
    last = demo.stdout.splitlines()[-1]
    assert "saw-run" in last
    assert demo.stdout.count("saw-run") == 1
    done = subprocess.run(["bash", "-c", last], cwd="/", capture_output=True, text=True, check=False, timeout=100)
    assert done.returncode == 0, done.stderr
    assert done.stdout
