"""nvcc from wheels: found where pip put it, and one sentence where it is not whole or not there."""

from __future__ import annotations

import runpy
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.support import ROOT

SCRIPT = ROOT / "plugins" / "pip_nvcc.py"
PARTS = runpy.run_path(str(SCRIPT))["PARTS"]


@pytest.fixture
def packages(tmp_path):
    """A Python's packages with the wheels of nvcc."""
    for name, part in PARTS.items():
        file = tmp_path / "nvidia" / "cu13" / part
        file.parent.mkdir(parents=True, exist_ok=True)
        file.touch()
        set_version(tmp_path, name, "13.0.88")
    return tmp_path


def set_version(packages: Path, name: str, version: str) -> None:
    for old in packages.glob(f"{name.replace('-', '_')}-*"):
        shutil.rmtree(old)
    info = packages / f"{name.replace('-', '_')}-{version}.dist-info"
    info.mkdir()
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n")


def find(packages: Path) -> tuple[int, str, str]:
    # -S: no packages but these.
    environment = {"PYTHONPATH": str(packages)}
    done = subprocess.run([sys.executable, "-S", SCRIPT], env=environment, capture_output=True, text=True, check=False)
    return done.returncode, done.stdout, done.stderr


def test_the_folder_is_printed(packages):
    assert find(packages) == (0, f"{packages / 'nvidia' / 'cu13'}\n", "")


def test_nothing_is_printed_where_there_is_none(tmp_path):
    assert find(tmp_path) == (0, "", "")


@pytest.mark.parametrize("name", sorted(set(PARTS) - {"nvidia-cuda-nvcc"}))
def test_a_wheel_that_is_missing_is_one_sentence(name, packages):
    (packages / "nvidia" / "cu13" / PARTS[name]).unlink()
    sentence = (
        f"error: pip's nvcc in {packages / 'nvidia' / 'cu13'} lacks wheels of its CUDA 13.0: "
        f"pip install '{name}==13.0.*'\n"
    )
    assert find(packages) == (2, "", sentence)


def test_wheels_of_another_cuda_are_one_sentence(packages):
    set_version(packages, "nvidia-nvvm", "13.5.37")
    set_version(packages, "nvidia-cuda-cccl", "13.3.5.0.6")
    code, out, err = find(packages)
    assert (code, out) == (2, "")
    assert err.endswith("of its CUDA 13.0: pip install 'nvidia-nvvm==13.0.*' 'nvidia-cuda-cccl==13.0.*'\n")


@pytest.mark.parametrize("partial", [False, True])
def test_kernels_without_an_nvcc_are_one_sentence(partial, packages, tmp_path):
    """The script's, before CMake says it in twenty lines."""
    if partial:
        (packages / "nvidia" / "cu13" / PARTS["nvidia-nvvm"]).unlink()
    else:
        shutil.rmtree(packages / "nvidia")
    tools = tmp_path / "tools"
    tools.mkdir()
    for tool in ("bash", "dirname"):
        (tools / tool).symlink_to(shutil.which(tool))
    (tools / "cmake").symlink_to("/bin/true")
    python = tools / "python"
    python.write_text(f'#!/bin/sh\nexec {sys.executable} -S "$@"\n')
    python.chmod(0o755)
    environment = {"PATH": str(tools), "PYTHON": str(python), "PYTHONPATH": str(packages)}
    command = [shutil.which("bash"), ROOT / "build_scripts" / "kernels"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    (line,) = done.stderr.splitlines()
    assert ("pip install 'nvidia-nvvm==13.0.*'" if partial else "error: there is no nvcc: ") in line
