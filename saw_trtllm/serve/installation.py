"""Finds a tritonserver, and what its Python backend needs to run the models on this interpreter."""

from __future__ import annotations

import importlib.util
import os
import re
import shutil
import sys
import sysconfig
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from saw_trtllm.errors import BackendUnavailableError, ConfigError
from saw_trtllm.serve.ports import Ports
from saw_trtllm.serve.python_environment import make_environment

STUB = "triton_python_backend_stub"

#: Seconds that requests in flight get to finish when the server is stopped.
EXIT_TIMEOUT = 10

#: Triton 2.51 crashes when its own patience with them ends, so that it ends later.
_TRITON_EXIT_TIMEOUT = 15

#: Flags of tritonserver by which users would contradict the launcher, and what to do instead.
_OWN_FLAGS = {
    "model-repository": "use --model_repo",
    "model-store": "use --model_repo",
    "backend-directory": "saw-triton chooses it",
    "grpc-address": "use --host",
    "grpc-port": "use --grpc_port",
    "http-address": "use --host",
    "http-port": "use --http_port",
    "metrics-address": "use --host",
    "metrics-port": "use --metrics_port",
    "allow-http": "saw-triton asks over HTTP whether the server is well",
    "http-restricted-api": "saw-triton asks over HTTP whether the server is well",
    "exit-timeout-secs": "saw-triton ends the server",
    "model-control-mode": "the models stay loaded",
    "load-model": "the models stay loaded",
    "repository-poll-secs": "the models stay loaded",
    "log-file": "saw-triton reads the log",
    "log-verbose": "use --log_level",
    "log-info": "use --log_level",
    "log-warning": "use --log_level",
    "log-error": "use --log_level",
}

#: The first release of NVIDIA's container whose tritonserver has fixed the known vulnerabilities: CVE-2025-23310,
#: 23311, 23319, 23320 and 23334 in 25.07, others in 25.08. The one in nvidia-pytriton 0.7.0 is Triton 2.51 of 24.10.
_MENDED = "25.08"

#: What to do about them.
ADVICE = (
    f"in a tritonserver before {_MENDED}, as nvidia-pytriton's is, whoever reaches it can crash it or run code "
    f"(CVE-2025-23310, 23319 and others): use NVIDIA's tritonserver container {_MENDED} or newer there"
)

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
    python : Path
        Folder whose ``python3`` tells the Python backend's interpreter where to find packages.
    """

    executable: Path
    backends: Path | None = None
    libraries: tuple[Path, ...] = ()
    preload: tuple[Path, ...] = ()
    python: Path = Path(sys.executable).parent

    def command(
        self, repository: Path, ports: Ports, log_level: str = "warning", flags: Sequence[str] = ()
    ) -> list[str]:
        """The command line that serves a model repository; ``flags`` are further ones of tritonserver."""
        command = [str(self.executable), f"--model-repository={repository}"]
        if self.backends is not None:
            command.append(f"--backend-directory={self.backends}")
        for name, port in (("grpc", ports.grpc), ("http", ports.http), ("metrics", ports.metrics)):
            command += [f"--{name}-address={ports.host}", f"--{name}-port={port}"]
        return [*command, f"--exit-timeout-secs={_TRITON_EXIT_TIMEOUT}", *_LOG_FLAGS[log_level], *flags]

    @property
    def search_paths(self) -> dict[str, list[Path]]:
        """Folders for the front of search paths, so that the models run on this interpreter and find this package."""
        preload = {"LD_PRELOAD": list(self.preload)} if self.preload else {}
        return {"PATH": [self.python], "LD_LIBRARY_PATH": list(self.libraries), **preload}

    def vulnerable(self) -> bool:
        """Whether the server may have known vulnerabilities: only NVIDIA's containers say which release they are."""
        release = os.environ.get("NVIDIA_TRITON_SERVER_VERSION", "")
        return self.backends is not None or not re.match(r"\d\d\.\d\d", release) or release < _MENDED

    def environment(self) -> dict[str, str]:
        """The process's own environment with :attr:`search_paths` in front."""
        env = dict(os.environ)
        for variable, folders in self.search_paths.items():
            paths = [*map(str, folders), *filter(None, env.get(variable, "").split(os.pathsep))]
            env[variable] = os.pathsep.join(dict.fromkeys(paths))
        return env


def check_flags(flags: Sequence[str]) -> None:
    """Reject flags for tritonserver that contradict the launcher's own.

    Raises
    ------
    ConfigError
        With the flag and what to do instead.
    """
    if flags and not flags[0].startswith("-"):
        raise ConfigError(f"{flags[0]!r} is no flag: flags of tritonserver follow --, as in -- --rate-limit=off")
    for flag in flags:
        name = flag.lstrip("-").partition("=")[0]
        # tritonserver takes beginnings of its flags, too.
        taken = next((own for own in _OWN_FLAGS if own.startswith(name)), None) if flag.startswith("--") else None
        if name and taken:
            raise ConfigError(f"tritonserver's flag --{taken} cannot be passed on: {_OWN_FLAGS[taken]}")
        if "shm-region-prefix-name" in flag:
            raise ConfigError("shm-region-prefix-name cannot be passed on: saw-triton gives each server its own")


def find_server(executable: Path | None, backends: Path) -> Installation:
    """Find a tritonserver, and let its models import what this interpreter can import.

    Parameters
    ----------
    executable : Path, optional
        The one to use. By default that on PATH, else the one in the nvidia-pytriton wheel.
    backends : Path
        Folder for the models' Python environment, and to assemble the wheel's Python backend in.

    Raises
    ------
    BackendUnavailableError
        If there is none, or its Python backend cannot run this interpreter.
    ConfigError
        If the folder cannot be written.
    """
    found = _find(executable, backends)
    try:
        return replace(found, python=make_environment(backends / f"python{_python_version()}"))
    except OSError as e:
        raise _not_writable(backends, e) from e


def _find(executable: Path | None, backends: Path) -> Installation:
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
    if int(np.__version__.split(".")[0]) > 1:
        raise BackendUnavailableError(
            f"the tritonserver of nvidia-pytriton is for NumPy 1 and this is {np.__version__}, with which its models "
            f"crash: pip install 'numpy<2', or give another server with --tritonserver"
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
        raise _not_writable(folder, e) from e
    libraries = (root.parent.parent / "nvidia_pytriton.libs", _libpython().parent)
    return Installation(root / "bin" / "tritonserver", backends, libraries)


def _not_writable(folder: Path, error: OSError) -> ConfigError:
    return ConfigError(f"the backend folder {folder} cannot be written ({error.strerror}): give another --model_repo")


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
