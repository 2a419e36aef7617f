"""What a run was made with: GPU, driver, versions, commit."""

from __future__ import annotations

import platform
import subprocess
from datetime import datetime, timezone
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import saw_trtllm
from benchmarks.common.record import Environment


def describe(command: str, commit: str | None, **known: Any) -> Environment:
    """The current machine and software.

    Parameters
    ----------
    command : str
        As it was typed.
    commit : str, optional
        For a tree without its git repository; else the repository says.
    known
        Other fields of :class:`~benchmarks.common.record.Environment`: what the run is made with.
    """
    head, dirty = (commit, None) if commit else _git_state()
    return Environment(
        driver=_nvidia_smi("driver_version") if known.get("gpu") else None,
        python=platform.python_version(),
        saw_trtllm=saw_trtllm.__version__,
        commit=head,
        dirty=dirty,
        command=command,
        date=datetime.now(timezone.utc).strftime("%Y-%m-%d %H:%M UTC"),
        **known,
    )


def cpu_name() -> str:
    """The CPU's model, or its architecture where Linux does not say more."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        lines = []
    return next((line.split(":")[1].strip() for line in lines if "model name" in line), platform.machine())


def gpu_name() -> str | None:
    """The first GPU's name as NVIDIA's driver has it; None where there is none."""
    return _nvidia_smi("name")


def _nvidia_smi(what: str) -> str | None:
    return _output("nvidia-smi", f"--query-gpu={what}", "--format=csv,noheader", "--id=0")


def version_of(package: str) -> str | None:
    """An installed package's version; None where it is not installed."""
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _git_state() -> tuple[str | None, bool | None]:
    """The commit, and whether there are changes beside it; None where there is no repository."""
    root = str(Path(saw_trtllm.__file__).parents[1])
    head = _output("git", "-C", root, "rev-parse", "--short=12", "HEAD")
    changes = _output("git", "-C", root, "status", "--porcelain", "--untracked-files=no")
    return head, None if head is None or changes is None else bool(changes)


def _output(*command: str) -> str | None:
    """What a command prints; None if it is not there or fails."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=20, check=True)
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip()
