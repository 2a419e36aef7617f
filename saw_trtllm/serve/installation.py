"""Finds a tritonserver, and what its Python backend needs to run the models on this interpreter."""

from __future__ import annotations

import importlib.util
import os
import re
import shutil
import sys
import sysconfig
from dataclasses import dataclass
from pathlib import Path

import saw_trtllm
from saw_trtllm.errors import BackendUnavailableError, ConfigError
from saw_trtllm.serve.ports import Ports

STUB = "triton_python_backend_stub"

#: Seconds that requests in flight get to finish when the server is stopped.
EXIT_TIMEOUT = 10

#: tritonserver's flags for the log levels of the commands.
_LOG_FLAGS = {
    "internal_error": ["--log-warning=false", "--log-info=false"],
    "error": ["--log-warning=false", "--log-info=false"],
    "warning": ["--log-info=false"],
    "info": [],
    "verbose": ["--log-verbose=1"],
    "debug": ["--log-verbose=2"],
}


@dataclass(frozen=True)
class Installation:
    """A tritonserver, and what its Python backend needs.

    Attributes
    ----------
    executable : Path
    backends : Path or None
        Folder of the backends; None is the server's own.
    libraries : tuple of Path
        Folders for ``LD_LIBRARY_PATH``.
    preload : tuple of Path
        Libraries for ``LD_PRELOAD``.
    """

    executable: Path
    backends: Path | None = None
    libraries: tuple[Path, ...] = ()
    preload: tuple[Path, ...] = ()

    def command(self, repository: Path, ports: Ports, log_level: str = "warning") -> list[str]:
        """The command line that serves a model repository."""
        command = [str(self.executable), f"--model-repository={repository}"]
        if self.backends is not None:
            command.append(f"--backend-directory={self.backends}")
        for name, port in (("grpc", ports.grpc), ("http", ports.http), ("metrics", ports.metrics)):
            command += [f"--{name}-address={ports.host}", f"--{name}-port={port}"]
        return [*command, f"--exit-timeout-secs={EXIT_TIMEOUT}", *_LOG_FLAGS[log_level]]

    @property
    def search_paths(self) -> dict[str, list[Path]]:
        """Folders for the front of search paths, so that the models run on this interpreter and find this package."""
        # The backend's interpreter takes its prefix, and so its site-packages, from the first python3 on PATH.
        # The package is named apart for installs that site-packages only points to.
        package = Path(saw_trtllm.__file__).parent.parent
        folders = {"PATH": [Path(sys.executable).parent], "PYTHONPATH": [package]}
        preload = {"LD_PRELOAD": list(self.preload)} if self.preload else {}
        return {**folders, "LD_LIBRARY_PATH": list(self.libraries), **preload}

    def environment(self) -> dict[str, str]:
        """The process's own environment with :attr:`search_paths` in front."""
        env = dict(os.environ)
        for variable, folders in self.search_paths.items():
            paths = [*map(str, folders), *filter(None, env.get(variable, "").split(os.pathsep))]
            env[variable] = os.pathsep.join(dict.fromkeys(paths))
        return env


def find_server(executable: Path | None, backends: Path) -> Installation:
    """Find a tritonserver.

    Parameters
    ----------
    executable : Path, optional
        The one to use. By default that on PATH, else the one in the nvidia-pytriton wheel.
    backends : Path
        Folder to assemble the wheel's Python backend in; not touched for another server.

    Raises
    ------
    BackendUnavailableError
        If there is none, or its Python backend cannot run this interpreter.
    """
    if executable is None:
        on_path = shutil.which("tritonserver")
        if on_path is None:
            return _pytriton(backends)
        executable = Path(on_path)
    elif not os.access(executable, os.X_OK) or executable.is_dir():
        raise ConfigError(f"--tritonserver {executable} is not an executable file")
    libraries = (_libpython().parent,)
    stub = executable.resolve().parent.parent / "backends" / "python" / STUB
    if stub.is_file():
        version = re.search(rb"libpython(\d+\.\d+)\.so", stub.read_bytes())
        if version is not None and version[1].decode() != _python_version():
            raise BackendUnavailableError(
                f"the Python backend of {executable} is for Python {version[1].decode()} and this is "
                f"{_python_version()}: install saw-trtllm for that Python, or take that server off PATH and install "
                f"nvidia-pytriton for this one"
            )
    return Installation(executable, libraries=libraries)


def _pytriton(backends: Path) -> Installation:
    """The server in the nvidia-pytriton wheel, with a Python backend for this interpreter put together."""
    spec = importlib.util.find_spec("pytriton")
    if spec is None or spec.origin is None:
        raise BackendUnavailableError(
            "no tritonserver is on PATH and nvidia-pytriton, which has one, is not installed: "
            "pip install 'saw-trtllm[triton]', or give --tritonserver PATH"
        )
    root = Path(spec.origin).parent / "tritonserver"
    stub = root / "python_backend_stubs" / _python_version() / STUB
    if not stub.is_file():
        have = ", ".join(sorted(p.name for p in stub.parent.parent.glob("*")))
        raise BackendUnavailableError(f"nvidia-pytriton has no backend for Python {_python_version()}, only for {have}")
    folder = backends / "python"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for file in (*(root / "backends" / "python").glob("*.*"), stub):
            target = folder / file.name
            if not target.is_file() or target.read_bytes() != file.read_bytes():
                shutil.copy(file, target)
    except OSError as e:
        raise ConfigError(
            f"the backend folder {folder} cannot be written ({e.strerror}): give another --model_repo"
        ) from e
    libraries = (root.parent.parent / "nvidia_pytriton.libs", _libpython().parent)
    return Installation(root / "bin" / "tritonserver", backends, libraries)


def _python_version() -> str:
    return f"{sys.version_info.major}.{sys.version_info.minor}"


def _libpython() -> Path:
    """The interpreter's shared library, which Triton's Python backend loads."""
    name = f"libpython{_python_version()}.so.1.0"
    folders = [sysconfig.get_config_var("LIBDIR"), Path(sys.base_prefix) / "lib", sysconfig.get_config_var("LIBPL")]
    if multiarch := sysconfig.get_config_var("MULTIARCH"):
        folders.append(Path("/usr/lib") / multiarch)
    for folder in filter(None, folders):
        if (Path(folder) / name).is_file():
            return Path(folder) / name
    raise BackendUnavailableError(
        f"Triton's Python backend needs {name}, which {sys.base_prefix} does not have: use a Python built with "
        f"--enable-shared, or on Debian and Ubuntu: apt install libpython{_python_version()}"
    )
