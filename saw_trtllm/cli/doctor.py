"""``saw-doctor``: what of the GPU path is here, and what is missing."""

from __future__ import annotations

import argparse
import importlib
import json
import platform
import sys
from collections.abc import Callable
from functools import partial
from typing import Any, TypeVar

from saw_trtllm.cli.common import format_bytes, print_table, run
from saw_trtllm.errors import BackendUnavailableError, SawError
from saw_trtllm.plugins.gpus import Driver
from saw_trtllm.plugins.kernels import KernelsLibrary, version_text
from saw_trtllm.plugins.library import load_plugins, plugin_library, tensorrt_libraries
from saw_trtllm.version import __version__

T = TypeVar("T")


def build_parser() -> argparse.ArgumentParser:
    """Describe the command's flags."""
    parser = argparse.ArgumentParser(
        prog="saw-doctor",
        description="Show what this machine has for engines on its GPU: package, kernels, driver, GPUs, TensorRT and "
        "the plugin library for it; and in one sentence what is missing. Exit code 0 if nothing is, else 2.",
    )
    parser.add_argument("--json", action="store_true", help="print a JSON object")
    return parser


def main(argv: list[str] | None = None) -> int:
    """Run the command and return its exit code."""
    args = build_parser().parse_args(argv)
    return run(lambda: examine(args))


def examine(args: argparse.Namespace) -> int:
    """Print what is there, and what is missing first."""
    found = Findings()
    if args.json:
        print(json.dumps(found.values | {"missing": found.missing}))
        return 2 if found.missing else 0
    print_table({name: _text(name, value) for name, value in found.values.items()})
    if found.missing:
        raise BackendUnavailableError(found.missing)
    print("engines of TensorRT can be built and run here")
    return 0


class Findings:
    """What is there by name, None what is not; and what to do about the first that is not, if any."""

    def __init__(self) -> None:
        self.missing: str | None = None
        kernels = self._try(KernelsLibrary.load)
        driver = self._try(Driver.load)
        if driver and not driver.gpus:
            self._lacks(
                "the NVIDIA driver shows no GPU: check CUDA_VISIBLE_DEVICES, or start the container with its GPUs"
            )
        if driver and kernels:
            self._check_gpus(driver, kernels)
        tensorrt = self._try(lambda: _import("tensorrt"))
        plugins = self._try(lambda: _load_plugins(tensorrt)) if tensorrt else None
        self._try(lambda: _import("cuda.bindings.runtime"))
        self.values: dict[str, Any] = {
            "package": __version__,
            "python": platform.python_version(),
            "kernels": kernels and kernels.path,
            "kernels_cuda": kernels and version_text(kernels.cuda),
            "images": kernels and kernels.images,
            "driver_cuda": driver and version_text(driver.cuda),
            "gpus": driver
            and [
                {"name": g.name, "compute_capability": version_text(g.capability), "memory": g.memory}
                for g in driver.gpus
            ],
            "tensorrt": tensorrt and tensorrt.__version__,
            "tensorrt_library": tensorrt and tensorrt_libraries(),
            "plugins": plugins,
        }

    def _check_gpus(self, driver: Driver, kernels: KernelsLibrary) -> None:
        """Require a driver for the kernels' CUDA, and an image for each GPU."""
        if driver.cuda[0] < kernels.cuda[0]:
            self._lacks(
                f"the NVIDIA driver runs CUDA {version_text(driver.cuda)} and the kernels are of CUDA "
                f"{version_text(kernels.cuda)}: install a driver of CUDA {kernels.cuda[0]}, or build the "
                f"kernels with a toolkit of CUDA {driver.cuda[0]}"
            )
        for gpu in driver.gpus:
            self._try(partial(kernels.check, gpu.name, gpu.capability))

    def _try(self, look: Callable[[], T]) -> T | None:
        try:
            return look()
        except SawError as e:
            self._lacks(str(e))
            return None

    def _lacks(self, sentence: str) -> None:
        self.missing = self.missing or sentence


def _import(name: str) -> Any:
    try:
        return importlib.import_module(name)
    except ImportError as e:
        raise BackendUnavailableError(f"{name} cannot be imported ({e}): pip install 'saw-trtllm[tensorrt]'") from e


def _load_plugins(tensorrt: Any) -> str:
    path = plugin_library(tensorrt)
    load_plugins(tensorrt)
    return str(path)


def _text(name: str, value: Any) -> str:
    if name == "gpus" and value:
        shown = (f"{g['name']}, {g['compute_capability']}, {format_bytes(g['memory'])}" for g in value)
        return "; ".join(shown)
    return ", ".join(value) if isinstance(value, list) else str(value or "none")


if __name__ == "__main__":
    sys.exit(main())
