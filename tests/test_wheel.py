"""The wheel of what ``build_scripts/kernels`` has built: audited, and installed into an empty environment."""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from saw_trtllm.version import __version__
from tests.support import ROOT

if importlib.util.find_spec("saw_trtllm._C") is None:
    pytest.skip("saw_trtllm._C is not built: run build_scripts/kernels", allow_module_level=True)
pytest.importorskip("elftools", reason="the extra `wheel` is not installed")

AUDIT = [sys.executable, str(ROOT / "build_scripts" / "audit_wheel.py")]


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    folder = tmp_path_factory.mktemp("wheel")
    command = [ROOT / "build_scripts" / "wheel", folder, "--built"]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=280)
    assert done.returncode == 0, done.stdout + done.stderr
    (path,) = folder.iterdir()
    assert done.stdout.splitlines()[-1] == str(path)
    return path


def test_the_wheel_is_for_this_python_and_its_libc(wheel):
    tag = f"cp{sys.version_info.major}{sys.version_info.minor}"
    assert wheel.name == f"saw_trtllm-{__version__}-{tag}-{tag}-manylinux_2_34_x86_64.whl"


def test_an_empty_environment_has_all_that_the_wheel_promises(wheel, tmp_path):
    environment = tmp_path / "environment"
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", environment], check=True, timeout=60)
    python = environment / "bin" / "python"
    install = [sys.executable, "-m", "pip", "--python", python, "install", "--quiet", "--disable-pip-version-check"]
    subprocess.run([*install, wheel], check=True, timeout=280)

    def run(*command: object) -> subprocess.CompletedProcess[str]:
        arguments = [str(environment / "bin" / str(command[0])), *map(str, command[1:])]
        return subprocess.run(arguments, cwd=tmp_path, capture_output=True, text=True, check=False, timeout=60)

    found = json.loads(run("saw-doctor", "--json").stdout)
    assert found["package"] == __version__
    assert Path(found["kernels"]).is_relative_to(environment)
    assert found["images"]
    done = run("python", "-c", "import saw_trtllm._C as c; print(c.ARCHITECTURES, c.philox_uniform(1, 2))")
    assert (done.returncode, done.stderr) == (0, "")
    assert run("saw-build", "--help").returncode == 0
    repository = next(environment.glob("lib/python*/site-packages/saw_trtllm/triton_model_repo"))
    assert (repository / "ensemble").is_dir()


def drop(name):
    return lambda files: files.pop(next(file for file in files if name in file))


def break_runpath(files):
    name = next(file for file in files if "/_C." in file)
    files[name] = files[name].replace(b"$ORIGIN\0", b"/no/where"[:7] + b"\0")


BROKEN = {
    "kernels": (drop("libsaw_kernels"), "libsaw_kernels.so is not in the wheel"),
    "module": (drop("/_C."), "the wheel must have one module _C"),
    "preload": (drop("preload"), "libsaw_trtllm_preload.so is not in the wheel"),
    "runpath": (break_runpath, "its RUNPATH must be $ORIGIN"),
}


@pytest.mark.parametrize(("change", "message"), BROKEN.values(), ids=BROKEN.keys())
def test_the_audit_says_what_a_wheel_lacks(change, message, wheel, tmp_path):
    with zipfile.ZipFile(wheel) as archive:
        files = {name: archive.read(name) for name in archive.namelist() if name.endswith(".so")}
    change(files)
    broken = tmp_path / wheel.name
    with zipfile.ZipFile(broken, "w") as archive:
        for name, content in files.items():
            archive.writestr(name, content)
    done = subprocess.run([*AUDIT, broken], capture_output=True, text=True, check=False, timeout=120)
    assert done.returncode == 2
    assert message in done.stderr
