"""Lets Triton's models import what this interpreter can import."""

from __future__ import annotations

import os
import site
import sys
import sysconfig
import venv
from pathlib import Path

import saw_trtllm


def make_environment(folder: Path) -> Path:
    """Make a virtual environment whose search path is this interpreter's.

    Triton's Python backend takes its prefix, and so its packages, from the first ``python3`` on PATH; from Python 3.11
    on it runs isolated, without ``PYTHONPATH`` and without the user's own packages.

    Parameters
    ----------
    folder : Path
        May exist.

    Returns
    -------
    Path
        The folder of its ``python3``.

    Raises
    ------
    OSError
        If it cannot be written.
    """
    venv.EnvBuilder(symlinks=True).create(folder)
    packages = Path(sysconfig.get_path("purelib", "posix_prefix", {"base": str(folder), "platbase": str(folder)}))
    target = packages / "saw_triton.pth"
    temporary = target.with_suffix(f".{os.getpid()}")
    temporary.write_text("".join(f"{line}\n" for line in _lines()), encoding="utf-8")
    temporary.replace(target)  # a server that starts meanwhile finds the old one or the new one, whole
    return folder / "bin"


def _lines() -> list[str]:
    """The search path as a ``.pth`` file, but for the standard library, which the interpreter finds by itself."""
    standard = {Path(sysconfig.get_path(name)) for name in ("stdlib", "platstdlib")}
    standard |= {folder / "lib-dynload" for folder in standard} | {Path(sys.executable).parent}  # that of a script
    sites = {*site.getsitepackages(), site.getusersitepackages()}
    lines = [str(Path(saw_trtllm.__file__).parent.parent)]  # for installs that site-packages only points to
    for entry in map(os.path.abspath, sys.path):
        if Path(entry) in standard or not os.path.exists(entry) or entry in lines:
            continue
        # Folders of packages may have .pth files of their own.
        lines.append(f"import site; site.addsitedir({entry!r})" if entry in sites else entry)
    return lines
