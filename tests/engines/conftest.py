"""These tests need TensorRT, the plugins and a GPU; what is missing is said once, here.

Engines and the reference's results are kept in the folder SAW_TEST_ENGINES, if it is set, and used again from there.
The reference runs in SAW_REFERENCE_PYTHON, by default the Python of the tests, which must have PyTorch.
"""

from __future__ import annotations

import importlib.util
import os
import shlex
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from saw_trtllm.errors import SawError
from tests.support import ROOT
from tests.support.locks import one_process

FOLDER = Path(__file__).parent


def _missing() -> str | None:
    if importlib.util.find_spec("tensorrt") is None:
        return "TensorRT is not installed"
    if importlib.util.find_spec("saw_trtllm._C") is None:
        return "saw_trtllm._C is not built: run build_scripts/kernels"
    try:
        from saw_trtllm.backends.tensorrt.device import compute_capability
        from saw_trtllm.plugins.library import plugin_library

        plugin_library(importlib.import_module("tensorrt"))
        compute_capability()
    except SawError as e:
        return str(e)
    return None


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    reason = _missing()
    for item in items:
        if FOLDER in item.path.parents:
            item.add_marker(pytest.mark.tensorrt)
            if reason:
                item.add_marker(pytest.mark.skip(reason=reason))


@pytest.fixture(scope="session")
def work(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where engines and results are."""
    kept = os.environ.get("SAW_TEST_ENGINES")
    return Path(kept) if kept else tmp_path_factory.mktemp("engines")


@pytest.fixture(scope="session")
def supported():
    """Skips a case whose dtype this TensorRT does not have."""
    from saw_trtllm.backends.tensorrt.versions import TensorRT

    def check(case) -> None:
        try:
            TensorRT.load().check_activations(case.dtype)
        except SawError as e:
            pytest.skip(str(e))

    return check


@pytest.fixture(scope="session")
def reference(work: Path):
    """What the reference makes of a case."""

    def load(case) -> dict[str, np.ndarray]:
        path = work / case.name / "reference.npz"
        with one_process(path.with_name("results.lock")):
            if not path.is_file():
                python = shlex.split(os.environ.get("SAW_REFERENCE_PYTHON", sys.executable))
                # What this Python was told of its libraries is not the other's.
                kept = {k: v for k, v in os.environ.items() if k not in ("PYTHONHOME", "LD_LIBRARY_PATH", "PYTHONPATH")}
                command = [*python, "-m", "tests.engines.reference", str(work), case.name]
                done = subprocess.run(
                    command,
                    env=kept | {"PYTHONPATH": str(ROOT)},
                    capture_output=True,
                    text=True,
                    check=False,
                    timeout=280,
                )
                assert done.returncode == 0, done.stderr
        with np.load(path) as found:
            return dict(found)

    return load
