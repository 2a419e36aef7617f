"""The tests marked ``gpu`` need a GPU, PyTorch with CUDA and the built module; what is missing is said once, here.

Those of the plugins also need the library and the headers it was built with: ``SAW_TENSORRT_INCLUDE_DIR`` names the
headers, ``SAW_PLUGIN_LIBRARY`` the library, by default the one that ``build_scripts/kernels`` leaves in the package.
"""

from __future__ import annotations

import importlib.util
import os
from pathlib import Path

import pytest

from tests.support import ROOT
from tests.support import plugin_library as lib


def _library() -> Path:
    built = ROOT / "saw_trtllm" / f"libsaw_trtllm_plugins_trt{lib.tensorrt_major(lib.include_dirs()[0])}.so"
    return Path(os.environ.get("SAW_PLUGIN_LIBRARY", built))


def _missing() -> str | None:
    import torch

    if not torch.cuda.is_available():
        return "PyTorch sees no CUDA GPU"
    if importlib.util.find_spec("saw_trtllm._C") is None:
        return "saw_trtllm._C is not built: run build_scripts/kernels"
    return None


@pytest.hookimpl(trylast=True)  # after -m has left out what it leaves out
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skip the tests for which something is missing."""
    marked = [item for item in items if item.get_closest_marker("gpu")]
    if marked and (reason := _missing()):
        for item in marked:
            item.add_marker(pytest.mark.skip(reason=reason))


@pytest.fixture
def rng():
    import torch

    return torch.Generator().manual_seed(20)


@pytest.fixture(scope="session")
def plugin_driver(tmp_path_factory):
    """The module that plays TensorRT's part, for the headers that the built library has."""
    if reason := lib.missing() or (None if _library().exists() else f"{_library().name} is not built"):
        pytest.skip(reason)
    return lib.build_driver(lib.include_dirs()[0], tmp_path_factory.mktemp("driver"))


@pytest.fixture(scope="session", params=["V2", "V3"])
def creators(request, plugin_driver):
    """The built library's plugin creators of one interface, by name."""
    if not getattr(plugin_driver, f"HAS_{request.param}"):
        pytest.skip(f"TensorRT {plugin_driver.TENSORRT[0]} has no {request.param} plugins")
    found = lib.creators(plugin_driver, _library())
    return {name: creator for (interface, name), creator in found.items() if interface == request.param}


@pytest.fixture
def make_plugin(creators, plugin_driver):
    """Make a plugin that went through its serialized form, by its fields."""
    import torch

    from saw_trtllm.plugins.library import load_cublas_lt

    if not load_cublas_lt():
        pytest.skip("there is no cuBLASLt")

    def make(name, dtype, **fields):
        if dtype == torch.bfloat16 and plugin_driver.TENSORRT[0] < 10:
            pytest.skip("TensorRT 8.6 has no bfloat16")
        plugin_driver.take_messages()
        plugin = creators[name].create(lib.to_fields({"dtype": str(dtype).removeprefix("torch."), **fields}))
        return creators[name].deserialize(plugin.serialized()).attach_to_context()

    return make


@pytest.fixture
def run_plugin(make_plugin):
    """Run one of the small plugins: its outputs by its inputs, all outputs of the first one's shape and dtype."""
    import torch

    def run(name, dtype, inputs, num_outputs=1, **fields):
        plugin = make_plugin(name, dtype, **fields)
        outputs = [torch.full_like(inputs[0], torch.nan) for _ in range(num_outputs)]
        bound = [(t.data_ptr(), list(t.shape)) for t in inputs]
        stream = torch.cuda.current_stream().cuda_stream
        assert plugin.enqueue(bound, [y.data_ptr() for y in outputs], 0, stream) == 0
        return outputs

    return run


@pytest.fixture
def layer_of(creators, plugin_driver):
    """Make the two plugins of an attention layer for a step."""
    from tests.support.plugin_layer import Layer

    def make(step, run=True):
        plugin_driver.take_messages()
        found = {name: creators[name] for name in (lib.WRITE, lib.ATTENTION)}
        return Layer(found, step, words=plugin_driver.TENSORRT[0] < 10, run=run)

    return make
