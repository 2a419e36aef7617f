"""Engines of a model's shape whose weights are random: for the time of a step it does not matter which they are."""

from __future__ import annotations

import logging
import time
from pathlib import Path

import numpy as np

from saw_trtllm import __version__
from saw_trtllm.checkpoint import expected_shapes
from saw_trtllm.config import ModelConfig
from saw_trtllm.engine import CONFIG_FILE, BuildConfig, EngineConfig, SawSection, engine_file
from saw_trtllm.errors import ConfigError
from saw_trtllm.format import KVFormat
from saw_trtllm.network.build import built_for, serialize_engine
from saw_trtllm.network.options import NetworkOptions
from saw_trtllm.network.versions import TensorRT

logger = logging.getLogger(__name__)

#: Random numbers that are drawn, and repeated: billions of them would take longer than the rest of the run. A prime, so
#: that no two rows of a matrix are alike.
_BLOCK = 1_048_583


class RandomWeights:
    """Weights of a model by name: normal, small enough that activations stay of order 1."""

    def __init__(self, model: ModelConfig) -> None:
        self._shapes = expected_shapes(model)
        self._block = np.random.default_rng(0).standard_normal(_BLOCK, np.float32).astype(np.float16)

    def load(self, name: str) -> np.ndarray:
        """A tensor in float16."""
        shape = self._shapes[name]
        if len(shape) == 1:
            return np.ones(shape, np.float16)
        return np.resize(self._block * np.float16(shape[-1] ** -0.5), shape)


def engine_config(kv: str, model: ModelConfig, limits: BuildConfig) -> EngineConfig:
    """The config of an engine with a cache of a format."""
    fmt = KVFormat(kv, model.head_size, model.dtype)
    section = SawSection.of(fmt, "tensorrt", __version__)
    return EngineConfig(version=__version__, pretrained_config=model, build_config=limits, saw_int4=section)


def build_random(folder: Path, config: EngineConfig, options: NetworkOptions) -> float:
    """Write an engine folder.

    Returns
    -------
    float
        Seconds that it took, with the making of the weights.
    """
    start = time.monotonic()
    tensorrt = TensorRT.load()
    config = built_for(config, tensorrt)
    engine = serialize_engine(tensorrt, config, RandomWeights(config.pretrained_config).load, options)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        (folder / engine_file()).write_bytes(engine)
        config.save(folder)
    except OSError as e:
        raise ConfigError(f"{folder} cannot be written ({e.strerror}): give another --engine_dir") from e
    return time.monotonic() - start


def open_or_build(
    folder: Path, kv: str, model: ModelConfig, limits: BuildConfig, options: NetworkOptions
) -> float | None:
    """See that a folder holds an engine of this shape, and build it if there is none.

    Returns
    -------
    float or None
        Seconds of the build; None if it was there.

    Raises
    ------
    ConfigError
        If the folder holds another engine.
    """
    if not (folder / CONFIG_FILE).exists():
        seconds = build_random(folder, engine_config(kv, model, limits), options)
        logger.info("%s: built in %.1f s", folder, seconds)
        return seconds
    found = EngineConfig.load(folder)
    if (found.saw_int4.kv, found.pretrained_config, found.build_config) != (kv, model, limits):
        raise ConfigError(f"{folder} holds another engine than this run measures: give another --engine_dir")
    return None
