"""The door from an engine without weights to the same engine with other weights, or another calibration."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from saw_trtllm.checkpoint import Checkpoint
from saw_trtllm.checkpoint.calibration import Calibration
from saw_trtllm.engine.config import CALIBRATION_FILE, EngineConfig, engine_file
from saw_trtllm.errors import ConfigError, EngineError
from saw_trtllm.paths import copy_file
from saw_trtllm.plan.folder import check_replaceable, replacing_engine
from saw_trtllm.plan.weights import EngineWeights, check_same_model


def plan_refit(engine_dir: Path, checkpoint_dir: Path, calibration: Path | None = None) -> EngineWeights:
    """Check an engine and the weights that it is to have against each other, without reading them.

    Parameters
    ----------
    engine_dir : Path
        Of an engine that was built with ``--strip_plan``.
    checkpoint_dir : Path
        A Hugging Face or a TensorRT-LLM folder of a model of the same shape.
    calibration : Path, optional
        By default the engine's, if it has one.

    Returns
    -------
    EngineWeights
        With the config of the new engine.

    Raises
    ------
    SawError
        In one sentence, the first thing that does not fit.
    """
    config = EngineConfig.load(engine_dir)
    section = config.saw_int4
    if section.weights is None:
        raise ConfigError(
            f"the engine in {engine_dir} holds its weights, and others cannot take their place: build one with "
            "saw-build --strip_plan"
        )
    if calibration is not None and not section.k_center:
        raise ConfigError(
            f"the engine in {engine_dir} was built without a calibration, and has no place for centers of keys: build "
            "it anew with saw-build --strip_plan --calibration"
        )
    checkpoint = Checkpoint.open(checkpoint_dir)
    check_same_model(checkpoint, config, engine_dir)
    found = Calibration.load(calibration or engine_dir / CALIBRATION_FILE) if section.k_center else None
    if found is not None:
        found.check(checkpoint)
    ids = {key: value for key, value in (checkpoint.config.model_extra or {}).items() if key.endswith("_token_id")}
    model = config.pretrained_config.model_copy(update=ids)
    return EngineWeights(checkpoint, config.model_copy(update={"pretrained_config": model}), found)


def refit(
    engine_dir: Path, weights: EngineWeights, output_dir: Path, progress: Callable[[str], None] | None = None
) -> EngineConfig:
    """Write an engine that takes its weights from another place.

    All of them are read, so that what is wrong with them is said now, and not when the engine is opened.

    Parameters
    ----------
    engine_dir : Path
        The engine of :func:`plan_refit`.
    weights : EngineWeights
        What that returned.
    output_dir : Path
        May be ``engine_dir``.
    progress : callable, optional
        Called with the name of each tensor that has been read.

    Returns
    -------
    EngineConfig
        Of the new engine.

    Raises
    ------
    CheckpointError
        If a weight cannot be read, is not finite, or is too large for the engine's dtype.
    ConfigError
        If the folder cannot be written.
    """
    with weights.reading_ahead(progress=progress) as load:
        for name in weights.shapes:
            load(name)
    config = weights.config
    section = config.saw_int4.model_copy(update={"weights": weights.source()})
    config = config.model_copy(update={"saw_int4": section})
    try:
        output_dir.mkdir(parents=True, exist_ok=True)
        check_replaceable(output_dir, weights.checkpoint.folder)
        with replacing_engine(output_dir, weights.checkpoint.folder) as part:
            config.save(part)
            if weights.calibration is not None:
                weights.calibration.save(part / CALIBRATION_FILE)
            for rank in range(config.tp_size):
                copy_file(engine_dir / engine_file(rank), part / engine_file(rank), EngineError)
    except OSError as e:
        raise ConfigError(
            f"{output_dir} cannot be written ({e.strerror or e}): choose another --output_dir or make room"
        ) from e
    return config
