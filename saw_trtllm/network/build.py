"""From a plan to a TensorRT engine of the project's own definitions."""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from saw_trtllm.builder import BuildPlan, replacing_engine
from saw_trtllm.engine import EngineConfig, engine_file
from saw_trtllm.errors import BackendUnavailableError, EngineError
from saw_trtllm.network.decoder import Load, define_decoder
from saw_trtllm.network.graph import Graph
from saw_trtllm.network.tensors import profiles, shapes, step_inputs
from saw_trtllm.network.versions import TensorRT
from saw_trtllm.plugins import VERSION

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class NetworkOptions:
    """What a build may do one way or the other.

    Attributes
    ----------
    decode_profile : bool
        Give steps of decodes alone kernels of their own. It makes the build about twice as long. TensorRT-LLM's
        executor does not know such a profile (with more than one it expects its own six), this project's runtime does.
    timing_cache : Path or None
        A file of kernels' times: read if it is there, and written behind the build, which a second time is shorter.
    """

    decode_profile: bool = True
    timing_cache: Path | None = None


def build_engine(
    plan: BuildPlan,
    progress: Callable[[str], None] | None = None,
    options: NetworkOptions | None = None,
    tensorrt: TensorRT | None = None,
) -> int:
    """Write the engine folder of a plan, its config last.

    Parameters
    ----------
    plan : BuildPlan
        Its folder is there.
    progress : callable, optional
        Called with the name of each tensor that has been read.
    options : NetworkOptions, optional
    tensorrt : TensorRT, optional
        By default the one that is installed.

    Returns
    -------
    int
        Bytes of the engine.

    Raises
    ------
    BackendUnavailableError
        If there is no TensorRT, no GPU or no plugin library.
    EngineError
        If TensorRT does not build the engine.
    """
    tensorrt = TensorRT.load() if tensorrt is None else tensorrt
    config = built_for(plan.config, tensorrt)

    def load(name: str) -> np.ndarray:
        array = plan.load(name)
        if progress is not None:
            progress(name)
        return array

    engine = serialize_engine(tensorrt, config, load, options or NetworkOptions())
    with replacing_engine(plan, config) as part, part.open("wb") as file:
        file.write(engine)
    return (plan.output_dir / engine_file()).stat().st_size


def serialize_engine(tensorrt: TensorRT, config: EngineConfig, load: Load, options: NetworkOptions) -> Any:
    """Define the network and have TensorRT build it.

    Returns
    -------
    buffer
        The serialized engine.
    """
    logger = tensorrt.logger()
    builder = tensorrt.builder(logger)
    tensorrt.load_plugins()
    graph = Graph(tensorrt, tensorrt.create_network(builder))
    define_decoder(graph, config, load)
    builder_config = tensorrt.create_config(builder)
    add_profiles(tensorrt, builder, builder_config, config, options.decode_profile)
    _read_timing_cache(builder_config, options.timing_cache)
    engine = builder.build_serialized_network(graph.network, builder_config)
    if engine is None:
        raise EngineError(f"TensorRT {tensorrt.version} did not build the engine: {logger.reason}")
    _write_timing_cache(builder_config, options.timing_cache)
    return engine


def add_profiles(
    tensorrt: TensorRT, builder: Any, builder_config: Any, config: EngineConfig, decode_profile: bool
) -> None:
    """Give every input its range in each optimization profile."""
    for ranges in profiles(config.build_config, decode_profile):
        profile = builder.create_optimization_profile()
        for tensor in step_inputs(config, tensorrt):
            profile.set_shape(tensor.name, *shapes(tensor, ranges))
        builder_config.add_optimization_profile(profile)


def built_for(config: EngineConfig, tensorrt: TensorRT) -> EngineConfig:
    """The config of an engine that this TensorRT built for this machine's GPU: a runtime must match both."""
    section = config.saw_int4.model_copy(
        update={
            "backend": "tensorrt",
            "plugin_version": VERSION,
            "tensorrt_version": tensorrt.version,
            "compute_capability": compute_capability(),
        }
    )
    return config.model_copy(update={"saw_int4": section})


def compute_capability() -> str:
    """That of the GPU in use, as in 9.0.

    Raises
    ------
    BackendUnavailableError
        If CUDA for Python is not installed, or there is no GPU.
    """
    try:
        from cuda.bindings import runtime
    except ImportError as e:
        raise BackendUnavailableError(
            f"CUDA for Python cannot be imported here ({e}): pip install 'saw-trtllm[tensorrt]'"
        ) from e
    error, device = runtime.cudaGetDevice()
    parts = []
    for name in ("Major", "Minor"):
        if error == runtime.cudaError_t.cudaSuccess:
            attribute = getattr(runtime.cudaDeviceAttr, f"cudaDevAttrComputeCapability{name}")
            error, value = runtime.cudaDeviceGetAttribute(attribute, device)
            parts.append(str(value))
    if error != runtime.cudaError_t.cudaSuccess:
        raise BackendUnavailableError(
            f"CUDA finds no GPU ({error.name}): use --backend reference, which runs on any CPU"
        )
    return ".".join(parts)


def _read_timing_cache(builder_config: Any, path: Path | None) -> None:
    if path is None:
        return
    cache = builder_config.create_timing_cache(path.read_bytes() if path.is_file() else b"")
    if cache is None or not builder_config.set_timing_cache(cache, False):
        log.warning("%s is of another TensorRT or GPU, or damaged: the build starts a new one", path)
        builder_config.set_timing_cache(builder_config.create_timing_cache(b""), False)


def _write_timing_cache(builder_config: Any, path: Path | None) -> None:
    if path is None:
        return
    part = path.with_name(path.name + ".part")
    part.write_bytes(bytes(memoryview(builder_config.get_timing_cache().serialize())))
    part.replace(path)
