"""TensorRT-LLM's own front-end, over a stand-in for TensorRT."""

from __future__ import annotations

import pytest

from tests.support.fakes import tensorrt as fake_tensorrt
from tests.support.fakes import tensorrt_frontend as fake_tensorrt_frontend


@pytest.fixture(scope="module")
def frontend():
    with fake_tensorrt_frontend.frontend() as loaded:
        fake_tensorrt.get_plugin_registry().saw = True
        yield loaded
