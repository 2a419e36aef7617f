"""A machine for the benchmarks of engines: the stand-ins of CUDA and TensorRT, and small sizes."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

from benchmarks.engine import cases
from tests.support.fakes import engine as fake_engine


def install(monkeypatch: Any, folder: Path) -> fake_engine.Module:
    """Have a reference engine's folder pass for one of TensorRT, and run it, until the test ends."""
    fake_engine.as_tensorrt(folder)
    module = fake_engine.install(monkeypatch, folder, 128 << 20)
    for name in ("on_gpu", "ranks"):
        monkeypatch.delitem(sys.modules, f"benchmarks.engine.{name}", raising=False)
    monkeypatch.setattr("benchmarks.engine.clock._DELAY_BYTES", 1 << 10)
    monkeypatch.setattr("benchmarks.engine.run.device.gpu_name", lambda: "NVIDIA Test")
    monkeypatch.setattr(cases, "PROFILED", {2: (16,)})
    return module
