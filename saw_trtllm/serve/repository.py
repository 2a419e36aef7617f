"""Writes a Triton model repository: the models of ``triton_model_repo`` and a ``config.pbtxt`` for each."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import saw_trtllm
from saw_trtllm.errors import BackendUnavailableError, ConfigError
from saw_trtllm.serve import names
from saw_trtllm.serve.names import Model, Tensor
from saw_trtllm.serve.parameters import Parameters

CONFIG_FILE = "config.pbtxt"


def template_folder() -> Path:
    """Folder of the models' Python files: in the installed package, or beside it in a source checkout."""
    package = Path(saw_trtllm.__file__).parent
    for folder in (package / "triton_model_repo", package.parent / "triton_model_repo"):
        if (folder / names.TENSORRT_LLM / names.VERSION / "model.py").is_file():
            return folder
    raise BackendUnavailableError(f"triton_model_repo is neither in {package} nor beside it: install saw-trtllm anew")


def model_configs(parameters: Parameters, max_batch_size: int) -> dict[str, Any]:
    """The models' configurations.

    Parameters
    ----------
    parameters : Parameters
    max_batch_size : int
        Prompts that one request may hold.

    Returns
    -------
    dict
        ``ModelConfig`` protobufs by the models' names.

    Raises
    ------
    BackendUnavailableError
        If tritonclient, which has the protobufs, is not installed.
    """
    pb = _protobufs()
    return {model.name: _config(pb, model, parameters, max_batch_size) for model in names.MODELS}


def _config(pb: Any, model: Model, parameters: Parameters, max_batch_size: int) -> Any:
    config = pb.ModelConfig(name=model.name, max_batch_size=max_batch_size)
    for t in model.inputs:
        config.input.add(name=t.name, data_type=_dtype(pb, t), dims=t.dims, optional=t.optional)
    for t in model.outputs:
        config.output.add(name=t.name, data_type=_dtype(pb, t), dims=t.dims)
    if model.steps and not parameters.decoupled_mode:
        config.platform = "ensemble"
        for step in model.steps:
            entry = config.ensemble_scheduling.step.add(model_name=step.model, model_version=-1)
            entry.input_map.update(step.inputs)
            entry.output_map.update(step.outputs)
        return config
    config.backend = "python"
    config.instance_group.add(count=1, kind=pb.ModelInstanceGroup.KIND_CPU)
    config.model_transaction_policy.decoupled = model.may_stream and parameters.decoupled_mode
    for key, value in parameters.strings(model.parameters).items():
        config.parameters[key].string_value = value
    return config


def _dtype(pb: Any, tensor: Tensor) -> int:
    return pb.DataType.Value(f"TYPE_{tensor.dtype}")


def _protobufs() -> Any:
    try:
        from tritonclient.grpc import model_config_pb2
    except ImportError as e:
        raise BackendUnavailableError(
            "tritonclient, which describes Triton's configuration, is not installed: pip install 'saw-trtllm[triton]'"
        ) from e
    return model_config_pb2


def write_repository(folder: Path, configs: dict[str, Any]) -> None:
    """Write a model repository. Models of other names that are already in the folder stay.

    Parameters
    ----------
    folder : Path
        May be the template itself: then only the ``config.pbtxt`` files are written.
    configs : dict
        What :func:`model_configs` returns.

    Raises
    ------
    ConfigError
        If the folder cannot be written.
    """
    from google.protobuf import text_format

    template = template_folder()
    try:
        for name, config in configs.items():
            version = folder / name / names.VERSION
            version.mkdir(parents=True, exist_ok=True)  # Triton wants the folder of an ensemble too, though it is empty
            source = template / name / names.VERSION / "model.py"
            if source.is_file() and folder.resolve() != template.resolve():
                shutil.copyfile(source, version / "model.py")
            text = "# Written by saw-triton: changes are lost when it runs again.\n" + text_format.MessageToString(
                config
            )
            (folder / name / CONFIG_FILE).write_text(text, encoding="utf-8")
    except OSError as e:
        raise ConfigError(
            f"the model repository {folder} cannot be written ({e.strerror}): give another --model_repo"
        ) from e
