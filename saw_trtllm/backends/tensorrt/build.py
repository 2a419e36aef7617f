"""From a plan to a TensorRT engine of the project's own definitions."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import CancelledError, ThreadPoolExecutor
from pathlib import Path
from threading import Event
from typing import Any

import numpy as np

from saw_trtllm.backends.tensorrt.constants import Load, LoadArray, PackedWeights, packed_tensors, weight_inputs
from saw_trtllm.backends.tensorrt.decoder import define_decoder
from saw_trtllm.backends.tensorrt.device import compute_capability
from saw_trtllm.backends.tensorrt.graph import Graph
from saw_trtllm.backends.tensorrt.profiles import profiles, shapes, step_inputs
from saw_trtllm.backends.tensorrt.versions import TensorRT
from saw_trtllm.checkpoint.writer import safetensors_header, tensor_bytes
from saw_trtllm.engine.config import CALIBRATION_FILE, EngineConfig, engine_file, weights_file
from saw_trtllm.errors import BackendUnavailableError, EngineError
from saw_trtllm.files import replacing_file, writing_large
from saw_trtllm.model.quantization import TensorSpec
from saw_trtllm.paths import reading
from saw_trtllm.plan.checksums import file_checksum
from saw_trtllm.plan.folder import replacing_engine
from saw_trtllm.plan.plan import BuildPlan
from saw_trtllm.plan.tensorrt_options import NetworkOptions, Phases
from saw_trtllm.plugins.library import CUBLAS_LT, VERSION, load_cublas_lt

log = logging.getLogger(__name__)

#: Bytes between the beginnings of two arrays of zeros.
_APART = 256


def build_engine(
    plan: BuildPlan,
    progress: Callable[[str], None] | None = None,
    phases: Phases | None = None,
    tensorrt: TensorRT | None = None,
) -> int:
    """Write the engine folder of a plan.

    Parameters
    ----------
    plan : BuildPlan
        Its folder is there.
    progress : callable, optional
        Called with the name of each tensor that has been read, once a rank.
    phases : Phases, optional
        Told of the phases of TensorRT's build, where it has them: from 10 on.
    tensorrt : TensorRT, optional
        By default the one that is installed.

    Returns
    -------
    int
        Bytes of the engines.

    Raises
    ------
    BackendUnavailableError
        If there is no TensorRT, no GPU or no plugin library.
    EngineError
        If TensorRT does not build the engine.
    """
    tensorrt = TensorRT.load() if tensorrt is None else tensorrt
    config = built_for(plan.config, tensorrt, plan.network.gemm_plugin)
    checksums = dict[str, str]()
    # First: it wants all cores, and TensorRT's start holds Python's lock.
    source = plan.weights.source() if plan.network.strip_plan else None
    with replacing_engine(plan.output_dir, plan.checkpoint.folder, checksums) as part:
        # One after the other: TensorRT's Python holds its lock where a build in another thread wants to log.
        for rank in range(config.tp_size):
            with plan.weights.of_rank(rank).reading_ahead(plan.network.workers, progress) as load:
                if plan.network.strip_plan:
                    engine = _serialize_stripped(tensorrt, config, load, plan, phases, rank)
                    checksums[engine_file(rank)] = _write(part / engine_file(rank), [engine])
                else:
                    packed = PackedWeights(load)
                    checksums |= write_engine(part, tensorrt, config, packed, plan.network, phases, rank)
        nbytes = sum((part / name).stat().st_size for name in checksums)
        section = config.saw_int4.model_copy(update={"weights": source})
        config.model_copy(update={"saw_int4": section}).save(part)
        if plan.network.strip_plan and plan.calibration is not None:
            plan.calibration.save(part / CALIBRATION_FILE)
        return nbytes


def write_engine(
    folder: Path,
    tensorrt: TensorRT,
    config: EngineConfig,
    load: LoadArray,
    options: NetworkOptions,
    phases: Phases | None = None,
    rank: int = 0,
    with_weights: bool = True,
) -> dict[str, str]:
    """Write a rank's engine with all its weights: those that are no part of the network while TensorRT builds.

    Parameters
    ----------
    folder : Path
    tensorrt : TensorRT
    config : EngineConfig
    load : callable
        As :func:`serialize_engine`'s; two threads call it.
    options : NetworkOptions
    phases : Phases, optional
    rank : int
    with_weights : bool
        Whether those that are no part of the network are written too.

    Returns
    -------
    dict of (str, str)
        Checksums of the files, by name.
    """
    paths = [folder / engine_file(rank)]
    paths += [folder / weights_file(rank)] if with_weights and weight_inputs(config) else []
    ended = Event()
    with ThreadPoolExecutor(1) as beside:
        written = [beside.submit(write_weights, path, config, load, ended) for path in paths[1:]]
        try:
            engine = serialize_engine(tensorrt, config, load, options, phases, rank)
            checksums = [_write(paths[0], [engine]), *(each.result() for each in written)]
        finally:
            ended.set()
    return {path.name: checksum for path, checksum in zip(paths, checksums, strict=True)}


def write_weights(path: Path, config: EngineConfig, load: LoadArray, ended: Event | None = None) -> str:
    """Write the weights that are a rank's inputs; the file's checksum.

    Raises
    ------
    CancelledError
        If ``ended`` is set before the last is written.
    """
    return _write(path, _tensors(weight_inputs(config), load, ended or Event()))


def _tensors(specs: dict[str, TensorSpec], load: LoadArray, ended: Event) -> Iterator[bytes | memoryview]:
    """The bytes of a safetensors file, piece by piece."""
    yield safetensors_header(specs)
    for name, spec in specs.items():
        if ended.is_set():
            raise CancelledError
        yield tensor_bytes(name, load(name), spec)


def _write(path: Path, pieces: Iterable[Any]) -> str:
    """Write a file; its checksum, which is computed while the disk is waited for."""
    with writing_large(path) as write:
        for piece in pieces:
            write(piece)
        return file_checksum(path)


def _serialize_stripped(
    tensorrt: TensorRT,
    config: EngineConfig,
    load: Load,
    plan: BuildPlan,
    phases: Phases | None,
    rank: int,
) -> Any:
    """A rank's engine without weights.

    TensorRT leaves out the constants that it is given, so it is given zeros. The weights are read beside it, to be
    checked.
    """
    weights = plan.weights.of_rank(rank)
    specs = {name: TensorSpec(shape, config.pretrained_config.dtype) for name, shape in weights.shapes.items()}
    for name, format in weights.formats.items():
        specs |= packed_tensors(name, format, weights.shapes[name])
    zeros = _zeros(specs) | weights.constants

    def read() -> None:
        for name in weights.shapes:
            load(name)

    with ThreadPoolExecutor(1) as beside:
        checked = beside.submit(read)
        engine = serialize_engine(tensorrt, config, zeros.__getitem__, plan.network, phases, rank)
        checked.result()
        return engine


def _zeros(specs: Mapping[str, TensorSpec]) -> dict[str, np.ndarray]:
    """Zeros in one piece of memory: TensorRT knows weights by where they begin, and no two begin at one place."""
    memory = np.zeros(max(spec.nbytes for spec in specs.values()) + len(specs) * _APART, np.uint8)
    starts = range(0, len(specs) * _APART, _APART)
    return {
        name: memory[start : start + spec.nbytes].view(spec.numpy_dtype).reshape(spec.shape)
        for (name, spec), start in zip(specs.items(), starts, strict=True)
    }


def serialize_engine(
    tensorrt: TensorRT,
    config: EngineConfig,
    load: LoadArray,
    options: NetworkOptions,
    phases: Phases | None = None,
    rank: int = 0,
) -> Any:
    """Define a rank's network and have TensorRT build it; ``load`` gives its part of the weights.

    Returns
    -------
    buffer
        The serialized engine.
    """
    logger = tensorrt.logger()
    builder = tensorrt.builder(logger)
    tensorrt.load_plugins()
    gemm_plugin = config.build_config.plugin_config.gemm_plugin
    graph = Graph(tensorrt, tensorrt.create_network(builder), gemm_plugin is not None, options.strip_plan)
    define_decoder(graph, config, load, rank)
    builder_config = tensorrt.create_config(builder, options.optimization_level)
    if options.strip_plan:
        tensorrt.strip(builder_config)
    if phases is not None:
        tensorrt.report_phases(builder_config, phases)
    add_profiles(tensorrt, builder, builder_config, config, options.has_decode_profile(gemm_plugin))
    _use_timing_cache(builder_config, options)
    engine = builder.build_serialized_network(graph.network, builder_config)
    if engine is None:
        raise EngineError(f"TensorRT {tensorrt.version} did not build the engine: {logger.reason}")
    _write_timing_cache(builder_config, options.output_timing_cache)
    return engine


def add_profiles(
    tensorrt: TensorRT, builder: Any, builder_config: Any, config: EngineConfig, decode_profile: bool
) -> None:
    """Give every input its range in each optimization profile: weights have a shape."""
    for ranges in profiles(config.build_config, decode_profile):
        profile = builder.create_optimization_profile()
        for tensor in step_inputs(config, tensorrt):
            profile.set_shape(tensor.name, *shapes(tensor, ranges))
        for name, spec in weight_inputs(config).items():
            profile.set_shape(name, *[spec.shape] * 3)
        builder_config.add_optimization_profile(profile)


def built_for(config: EngineConfig, tensorrt: TensorRT, gemm_plugin: str = "auto") -> EngineConfig:
    """The config of an engine that this TensorRT built for this machine's GPU: a runtime must match both.

    Raises
    ------
    BackendUnavailableError
        If the GEMM plugin is asked for and its library is not there.
    """
    limits = config.build_config
    plugin = _gemm_plugin(gemm_plugin, config.pretrained_config.dtype)
    if config.saw_int4.quantized and not load_cublas_lt():
        raise BackendUnavailableError(f"quantized weights need cuBLASLt, which cannot be loaded: {CUBLAS_LT}")
    switches = limits.plugin_config.model_copy(update={"gemm_plugin": plugin})
    section = config.saw_int4.model_copy(
        update={
            "backend": "tensorrt",
            "plugin_version": VERSION,
            "tensorrt_version": tensorrt.version,
            "compute_capability": compute_capability(),
        }
    )
    limits = limits.model_copy(update={"plugin_config": switches})
    return config.model_copy(update={"saw_int4": section, "build_config": limits})


def _gemm_plugin(choice: str, dtype: str) -> str | None:
    """The dtype of the GEMM plugin, or None for TensorRT's own GEMMs."""
    if choice == "disable":
        return None
    if load_cublas_lt():
        return dtype
    if choice == "auto":
        log.warning(
            "without cuBLASLt TensorRT's own GEMMs are taken, with which builds take several times as long and decodes "
            "up to a third longer: %s",
            CUBLAS_LT,
        )
        return None
    raise BackendUnavailableError(f"--gemm_plugin {choice} needs cuBLASLt, which cannot be loaded: {CUBLAS_LT}")


def _use_timing_cache(builder_config: Any, options: NetworkOptions) -> None:
    """Build with the times of the input cache; an empty one makes TensorRT keep those of this build."""
    path = options.input_timing_cache
    if path is None and options.output_timing_cache is None:
        return
    times = b""
    if path is not None:
        with reading(path):
            times = path.read_bytes()
    cache = builder_config.create_timing_cache(times)
    if cache is None or not builder_config.set_timing_cache(cache, False):
        log.warning("%s is of another TensorRT or GPU, or damaged: the build starts a new one", path)
        builder_config.set_timing_cache(builder_config.create_timing_cache(b""), False)


def _write_timing_cache(builder_config: Any, path: Path | None) -> None:
    if path is None:
        return
    with replacing_file(path) as file:
        file.write(memoryview(builder_config.get_timing_cache().serialize()))
