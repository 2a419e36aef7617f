"""The GPU tests need a GPU, PyTorch with CUDA and the built module; what is missing is said once, here."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest
import torch

FOLDER = Path(__file__).parent


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
