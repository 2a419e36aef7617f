"""A machine with a GPU, TensorRT and the plugin library, as far as a build asks for them."""

from pathlib import Path

from saw_trtllm.backends.tensorrt import backend, device
from tests.support.fakes import tensorrt as fake_tensorrt

NAME, FREE = "NVIDIA Test", 100 << 30


def pretend_gpu(monkeypatch) -> None:
    """Put the stand-in in TensorRT's place until the test ends, with a GPU beside it."""
    fake_tensorrt.install(monkeypatch)
    monkeypatch.setattr(fake_tensorrt.get_plugin_registry(), "saw", True)
    monkeypatch.setattr(backend, "plugin_library", lambda trt: Path(__file__))
    values = {"compute_capability": "9.0", "gpu_name": NAME, "free_memory": FREE, "check_kernels": None}
    for name, value in values.items():
        monkeypatch.setattr(device, name, lambda value=value: value)
    monkeypatch.setattr("saw_trtllm.backends.tensorrt.build.compute_capability", device.compute_capability)
