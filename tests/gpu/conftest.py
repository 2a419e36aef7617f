"""The GPU tests need a GPU, PyTorch with CUDA and the built module; what is missing is said once, here.

Those of the plugins also need the library and the headers it was built with: ``SAW_TENSORRT_INCLUDE_DIR`` names the
headers, ``SAW_PLUGIN_LIBRARY`` the library, by default the one that ``build_scripts/kernels`` leaves in the package.
"""

from __future__ import annotations

import importlib.util
import os
from pathlib import Path

import plugin_library as lib
import pytest
import torch
from plugin_layer import Layer
from plugin_library import ATTENTION, WRITE
from steps import Step

FOLDER = Path(__file__).parent
LIBRARY = Path(os.environ.get("SAW_PLUGIN_LIBRARY", lib.ROOT / "saw_trtllm" / "libsaw_trtllm_plugins.so"))


def _missing() -> str | None:
    if not torch.cuda.is_available():
        return "PyTorch sees no CUDA GPU"
    if importlib.util.find_spec("saw_trtllm._C") is None:
        return "saw_trtllm._C is not built: run build_scripts/kernels"
    return None


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    reason = _missing()
    for item in items:
        if FOLDER in item.path.parents:
            item.add_marker(pytest.mark.gpu)
            if reason:
                item.add_marker(pytest.mark.skip(reason=reason))


@pytest.fixture
def rng() -> torch.Generator:
    return torch.Generator().manual_seed(20)


@pytest.fixture(scope="session")
def driver(tmp_path_factory):
    if reason := lib.missing() or (None if LIBRARY.exists() else f"{LIBRARY.name} is not built"):
        pytest.skip(reason)
    return lib.build_driver(lib.include_dirs()[0], tmp_path_factory.mktemp("driver"))


@pytest.fixture(scope="session", params=["V2", "V3"])
def creators(request, driver):
    if not getattr(driver, f"HAS_{request.param}"):
        pytest.skip(f"TensorRT {driver.TENSORRT[0]} has no {request.param} plugins")
    found = lib.creators(driver, LIBRARY)
    return {name: creator for (interface, name), creator in found.items() if interface == request.param}


@pytest.fixture
def layer_of(creators, driver):
    def make(step: Step, run: bool = True) -> Layer:
        driver.take_messages()
        return Layer(
            {name: creators[name] for name in (WRITE, ATTENTION)}, step, words=driver.TENSORRT[0] < 10, run=run
        )

    return make
