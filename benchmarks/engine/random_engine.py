"""Engines of a model's shape whose weights are random: for the time of a step it does not matter which they are."""

from __future__ import annotations

import contextlib
import fcntl
import json
import logging
import math
import os
import subprocess
import sys
import time
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from pathlib import Path
from threading import Lock

import ml_dtypes
import numpy as np
import tokenizers

from saw_trtllm.backends.tensorrt.build import built_for, write_engine, write_weights
from saw_trtllm.backends.tensorrt.constants import SCALES, packed_tensors, weight_inputs
from saw_trtllm.backends.tensorrt.versions import TensorRT
from saw_trtllm.backends.tensorrt.weights import stored_weights
from saw_trtllm.checkpoint import NUMPY_DTYPES, expected_shapes, shard_shape
from saw_trtllm.engine.config import EngineConfig, SawSection, weights_file
from saw_trtllm.engine.limits import BuildConfig
from saw_trtllm.errors import ConfigError, EngineError, SawError
from saw_trtllm.files import replacing_folder
from saw_trtllm.format import KVFormat
from saw_trtllm.model.config import ModelConfig
from saw_trtllm.model.quantization import WeightFormat
from saw_trtllm.plan.checksums import file_checksum, record_checksums
from saw_trtllm.plan.folder import ENGINE_FILES
from saw_trtllm.plan.formats import own_formats
from saw_trtllm.plan.tensorrt_options import NetworkOptions
from saw_trtllm.version import __version__

logger = logging.getLogger(__name__)

#: Random numbers that are drawn, and repeated: billions of them would take longer than the rest of the run. A prime, so
#: that no two rows of a matrix are alike.
_BLOCK = 1_048_583
#: Of them, between the beginnings of two matrices: no two are alike.
_STRIDE = 64
#: The weights of all engines in a folder's folders, of one shape.
WEIGHTS = "random.safetensors"
#: Between two reports of a build that goes on.
_REPORT_S = 15.0


class RandomWeights:
    """A rank's part of a model's weights by name: normal, small enough that activations stay of order 1.

    Matrices of a width are parts of one array: TensorRT takes them from where they lie, so that a model of 16 GB takes
    1 GB of the host's memory, and no time.
    """

    def __init__(self, model: ModelConfig, quantized: Mapping[str, WeightFormat] | None = None) -> None:
        self._quantized = quantized or {}
        self._dtype = NUMPY_DTYPES[model.dtype]
        self._shapes = {name: shard_shape(name, model, model.mapping.tp_size) for name in expected_shapes(model)}
        self._block = np.random.default_rng(0).standard_normal(_BLOCK, np.float32)
        self._starts = {name: i * _STRIDE for i, name in enumerate(self._shapes)}
        self._numbers: dict[int, np.ndarray] = {}
        self._lock = Lock()  # a thread writes the shared weights while TensorRT builds

    def load(self, name: str) -> np.ndarray:
        """A tensor in the model's dtype, or an array of a quantized weight; it is not to be written to."""
        with self._lock:
            if name not in self._shapes:
                return self._packed(name)
            shape = self._shapes[name]
            if len(shape) == 1:
                return np.ones(shape, self._dtype)
            start, size = self._starts[name], math.prod(shape)
            return self._of_width(shape[-1])[start : start + size].reshape(shape)

    def _of_width(self, width: int) -> np.ndarray:
        """Numbers for all matrices of a width."""
        if width not in self._numbers:
            largest = max(math.prod(shape) for shape in self._shapes.values() if shape[-1] == width)
            block = (self._block * width**-0.5).astype(self._dtype)
            self._numbers[width] = np.resize(block, largest + len(self._shapes) * _STRIDE)
        return self._numbers[width]

    def _packed(self, name: str) -> np.ndarray:
        weight, _, part = name.rpartition(".")
        format = self._quantized[weight]
        shape, int4 = packed_tensors(weight, format, self._shapes[weight])[name].shape, format.kind == "int4"
        if f".{part}" == SCALES:
            # So that weights are as those in 16 bits: integers from 0 to 15 lie some 4.6 from 8, their zero point.
            scale = np.full(shape, self._shapes[weight][1] ** -0.5 / (4.6 if int4 else 1.0), np.float32)
            return ((scale.view(np.uint32) & ~np.uint32(31)) | 8).view(np.float32) if int4 else scale
        width = 0  # that no matrix has
        if width not in self._numbers:
            few = self._block.astype(ml_dtypes.float8_e4m3fn).view(np.uint8)
            few = np.random.default_rng(1).integers(0, 256, _BLOCK, np.uint8) if int4 else few
            largest = max(math.prod(shape) for shape in self._shapes.values())
            self._numbers[width] = np.resize(few, 4 * (largest + len(self._shapes) * _STRIDE)).view(np.int32)
        start = self._starts[weight]
        return self._numbers[width][start : start + math.prod(shape)].reshape(shape)


def engine_config(kv: str, model: ModelConfig, limits: BuildConfig, qformat: str = "full_prec") -> EngineConfig:
    """The config of an engine with a cache of a format, and weights of one of ``--qformat``'s."""
    fmt = KVFormat(kv, model.head_size, model.dtype)
    section = SawSection.of(fmt, "tensorrt", __version__)
    if qformat != "full_prec":
        section = section.model_copy(update={"quantized": own_formats(model, qformat)})
    return EngineConfig(version=__version__, pretrained_config=model, build_config=limits, saw_int4=section)


def build_random(folder: Path, config: EngineConfig, options: NetworkOptions) -> None:
    """Write an engine folder; engines in folders beside each other share one file of weights.

    Raises
    ------
    ConfigError
        If it cannot be written.
    SawError
        If TensorRT does not build the engine.
    """
    tensorrt = TensorRT.load()
    config = built_for(config, tensorrt, options.gemm_plugin)
    try:
        with replacing_folder(folder, ENGINE_FILES) as part:
            checksums = _write_ranks(part, folder.parent / WEIGHTS, tensorrt, config, options)
            write_tokenizer(part, config.pretrained_config.vocab_size)
            config.save(part)
            record_checksums(part, checksums)
    except OSError as e:
        raise ConfigError(f"{folder} cannot be written ({e.strerror}): give another --engine_dir") from e


def _write_ranks(
    folder: Path, shared: Path, tensorrt: TensorRT, config: EngineConfig, options: NetworkOptions
) -> dict[str, str]:
    """Write all ranks' engines, and link their weights, all of the same shapes, to the shared ones."""
    weights = RandomWeights(config.pretrained_config, config.saw_int4.quantized)

    def write(rank: int) -> dict[str, str]:
        return write_engine(folder, tensorrt, config, weights.load, options, rank=rank, with_weights=False)

    with ThreadPoolExecutor(1) as beside:
        written = beside.submit(_share_weights, shared, config, weights) if weight_inputs(config) else None
        checksums = {name: x for rank in range(config.tp_size) for name, x in write(rank).items()}
        for rank in range(config.tp_size if written else 0):
            checksums[weights_file(rank)] = written.result()
            os.link(shared, folder / weights_file(rank))
    return checksums


def _share_weights(path: Path, config: EngineConfig, weights: RandomWeights) -> str:
    """Write the weights that engines of one shape share, unless they are there; their checksum."""
    with path.with_suffix(".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # engines of several formats are built at once
        try:
            stored_weights(path, weight_inputs(config))
            return file_checksum(path)
        except EngineError:  # not there, of a build that was ended, or of another shape
            path.unlink(missing_ok=True)
            return write_weights(path, config, weights.load)


def write_tokenizer(folder: Path, vocab_size: int) -> None:
    """Write a ``tokenizer.json`` whose words are ``w0``, ``w1``, and so on: whoever serves the engine needs one."""
    words = {f"w{i}": i for i in range(vocab_size)}
    tokenizer = tokenizers.Tokenizer(tokenizers.models.WordLevel(words, unk_token="w0"))
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
    tokenizer.save(str(folder / "tokenizer.json"), pretty=False)


def build_in_child(folder: Path, config: EngineConfig, options: NetworkOptions, timeout_s: float | None) -> float:
    """Build in a process of its own, which can be ended, and whose memory is free again after it.

    Returns
    -------
    float
        Seconds that it took, with the making of the weights.

    Raises
    ------
    EngineError
        If it fails, or takes longer than ``timeout_s``.
    """
    start = time.monotonic()
    job = {"folder": str(folder), "config": config.model_dump(mode="json"), "options": asdict(options)}
    job["log_level"] = logging.getLogger().getEffectiveLevel()
    command = [sys.executable, "-m", "benchmarks.engine.random_engine", json.dumps(job, default=str)]
    with subprocess.Popen(command) as child:
        while True:
            with contextlib.suppress(subprocess.TimeoutExpired):
                code = child.wait(_REPORT_S if timeout_s is None else min(_REPORT_S, timeout_s))
                break
            seconds = time.monotonic() - start
            logger.info("%s: building for %.0f s", folder, seconds)
            if timeout_s is not None and seconds >= timeout_s:
                child.kill()
                raise EngineError(
                    f"{folder} was not built within {timeout_s:g} s: give a lower --builder_optimization_level, fewer "
                    "--num_layers, or more time"
                )
    if code:
        raise EngineError(f"{folder} could not be built: see above")
    return time.monotonic() - start


def main() -> int:
    """The child's side of :func:`build_in_child`."""
    job = json.loads(sys.argv[1])
    options = job["options"]
    for name in ("input_timing_cache", "output_timing_cache"):
        options[name] = options[name] and Path(options[name])
    # With times: a build can be long, and TensorRT's messages tell of what.
    logging.basicConfig(level=job["log_level"], format="%(asctime)s [%(levelname)s] %(message)s")
    try:
        build_random(Path(job["folder"]), EngineConfig.model_validate(job["config"]), NetworkOptions(**options))
    except SawError as e:
        print(f"error: {e}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
