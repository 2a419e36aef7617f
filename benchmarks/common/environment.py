"""What a run was made with: GPU, driver, versions, commit."""

from __future__ import annotations

import platform
import subprocess
from datetime import datetime, timezone
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import saw_trtllm
from benchmarks.common.record import Environment


def describe(command: str, commit: str | None, flashinfer: bool, official: str | None) -> Environment:
    """The current GPU and software.

    Parameters
    ----------
    command : str
        As it was typed.
    commit : str, optional
        For a tree without its git repository; else the repository says.
    flashinfer : bool
        Whether FlashInfer takes part.
    official : str, optional
        Digest of the official kernels, where they take part.
    """
    import torch

    head, dirty = (commit, None) if commit else git_state()
    return Environment(
        gpu=torch.cuda.get_device_name(),
        driver=driver_version(),
        cuda=torch.version.cuda,
        python=platform.python_version(),
        torch=torch.__version__,
        triton=_version("triton"),
        flashinfer=_version("flashinfer-python") if flashinfer else None,
        official=official,
        saw_trtllm=saw_trtllm.__version__,
        commit=head,
        dirty=dirty,
        command=command,
        date=today(),
    )


def today() -> str:
    """The date and time of a record."""
    return datetime.now(timezone.utc).strftime("%Y-%m-%d %H:%M UTC")


def driver_version() -> str | None:
    """NVIDIA's driver; None where there is none."""
    return _output("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader", "--id=0")


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def git_state() -> tuple[str | None, bool | None]:
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
