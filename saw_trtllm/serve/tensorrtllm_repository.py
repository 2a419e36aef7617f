"""TensorRT-LLM's own Triton model repository, filled in for a SAW engine."""

from __future__ import annotations

import re
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from saw_trtllm.backends.tensorrt_llm.release import LAST_RELEASE
from saw_trtllm.engine.config import EngineConfig
from saw_trtllm.errors import BackendUnavailableError, ConfigError, EngineError
from saw_trtllm.paths import copy_file, is_file, reading
from saw_trtllm.serve.names import TENSORRT_LLM, VERSION
from saw_trtllm.serve.parameters import Parameters

#: Where NVIDIA's container has the models.
CONTAINER_TEMPLATE = Path("/app/all_models/inflight_batcher_llm")
MODELS = ("preprocessing", TENSORRT_LLM, "postprocessing", "ensemble", "tensorrt_llm_bls")
#: saw-triton's names of TensorRT-LLM's two backends, and Triton's.
BACKENDS = {"tensorrtllm": "tensorrtllm", "tensorrtllm_python": "python"}

_CONFIG = "config.pbtxt"
_PLACEHOLDER = re.compile(r"\$\{(\w+)\}")
#: TensorRT-LLM's Python model under another name, and what takes its place.
_THEIR_MODEL = "tensorrt_llm_model.py"
_OUR_MODEL = f'''\
"""Written by saw-triton: TensorRT-LLM's model, with the plugins of saw_trtllm loaded before the engine."""

import importlib.util
from pathlib import Path

from saw_trtllm.plugins.library import load_plugins

_spec = importlib.util.spec_from_file_location("tensorrt_llm_model", Path(__file__).with_name("{_THEIR_MODEL}"))
_module = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(_module)


class TritonPythonModel(_module.TritonPythonModel):
    def initialize(self, args):
        load_plugins()
        super().initialize(args)
'''


def check_engine(folder: Path) -> EngineConfig:
    """The config of an engine that TensorRT-LLM can serve.

    Raises
    ------
    EngineError
        If there is none, or it is another backend's.
    """
    config = EngineConfig.load(folder)
    if config.saw_int4.backend != "tensorrt_llm":
        raise EngineError(
            f"the engine in {folder} is of the backend {config.saw_int4.backend}, and TensorRT-LLM serves its own: "
            "build it with saw-build --backend tensorrt_llm or trtllm-build"
        )
    return config


def find_template(folder: Path | None) -> Path:
    """The folder of TensorRT-LLM's Triton models: the one given, or the container's.

    Raises
    ------
    ConfigError
        If it does not hold them.
    """
    template = CONTAINER_TEMPLATE if folder is None else folder
    missing = [name for name in MODELS if not is_file(template / name / _CONFIG)]
    if missing:
        raise ConfigError(
            f"{template} has no {missing[0]}/{_CONFIG}: give TensorRT-LLM {LAST_RELEASE}'s folder "
            "triton_backend/all_models/inflight_batcher_llm with --template_repo"
        )
    return template


def template_values(parameters: Parameters, config: EngineConfig, backend: str, max_batch_size: int) -> dict[str, str]:
    """What stands for each placeholder of TensorRT-LLM's templates; those that are left out keep its defaults.

    Parameters
    ----------
    parameters : Parameters
    config : EngineConfig
    backend : str
        One of :data:`BACKENDS`.
    max_batch_size : int
        Prompts that one request may hold.
    """
    logits = (config.pretrained_config.model_extra or {}).get("logits_dtype", "float32")
    values = {
        "triton_backend": BACKENDS[backend],
        "triton_max_batch_size": max_batch_size,
        "decoupled_mode": parameters.decoupled_mode,
        "batching_strategy": "inflight_fused_batching",
        "engine_dir": parameters.gpt_model_path,
        "tokenizer_dir": parameters.tokenizer_folder,
        "max_beam_width": 1,
        "enable_kv_cache_reuse": parameters.enable_kv_cache_reuse,
        "enable_chunked_context": True,
        "kv_cache_free_gpu_mem_fraction": parameters.kv_cache_free_gpu_mem_fraction,
        "exclude_input_in_output": parameters.exclude_input_in_output,
        "cancellation_check_period_ms": parameters.cancellation_check_period_ms,
        "stats_check_period_ms": parameters.stats_check_period_ms,
        "max_queue_delay_microseconds": 0,
        "max_queue_size": parameters.max_queue_size,
        "logits_datatype": {"float16": "TYPE_FP16"}.get(logits, "TYPE_FP32"),
        "encoder_input_features_data_type": "TYPE_FP16",
        "prompt_embedding_table_data_type": "TYPE_FP16",
        "preprocessing_instance_count": 1,
        "postprocessing_instance_count": 1,
        "bls_instance_count": 1,
        "add_special_tokens": parameters.add_special_tokens,
        "skip_special_tokens": True,
        "multimodal_model_path": "",  # asked for, and then may be empty
        "accumulate_tokens": False,
        "tensorrt_llm_model_name": TENSORRT_LLM,
    }
    if parameters.kv_cache_host_memory_bytes:
        values["kv_cache_host_memory_bytes"] = parameters.kv_cache_host_memory_bytes
    if parameters.max_tokens_in_paged_kv_cache is not None:
        values["max_tokens_in_paged_kv_cache"] = parameters.max_tokens_in_paged_kv_cache
    return {k: str(v).lower() if isinstance(v, bool) else str(v) for k, v in values.items()}


def fill_repository(template: Path, folder: Path, values: Mapping[str, str]) -> None:
    """Copy TensorRT-LLM's models and fill in their ``config.pbtxt``.

    A parameter whose placeholder has no value is left out, which both of TensorRT-LLM's backends take for its default.

    Raises
    ------
    ConfigError
        If a template is not as TensorRT-LLM has it, or the folder cannot be written.
    """
    configs = {name: _fill(template / name / _CONFIG, values) for name in MODELS}
    try:
        for name, text in configs.items():
            shutil.copytree(template / name, folder / name, dirs_exist_ok=True, copy_function=_copy)
            (folder / name / VERSION).mkdir(exist_ok=True)  # Triton wants the folder of an ensemble too
            (folder / name / _CONFIG).write_text(text, encoding="utf-8")
        if values["triton_backend"] == "python":
            model = folder / TENSORRT_LLM / VERSION / "model.py"
            model.replace(model.with_name(_THEIR_MODEL))
            model.write_text(_OUR_MODEL, encoding="utf-8")
    except OSError as e:
        raise ConfigError(
            f"the model repository {folder} cannot be written ({e.strerror or e}): give another --model_repo"
        ) from e


def _copy(source: str, target: str) -> None:
    copy_file(Path(source), Path(target))
    shutil.copymode(source, target)


def _fill(path: Path, values: Mapping[str, str]) -> str:
    text_format, pb = _protobuf()
    with reading(path):
        text = path.read_text(encoding="utf-8")
    filled = _PLACEHOLDER.sub(lambda m: values.get(m[1], m[0]), text)
    try:
        config = text_format.Parse(filled, pb.ModelConfig())
    except text_format.ParseError as e:
        raise ConfigError(
            f"{path} cannot be filled in ({e}): use the models of TensorRT-LLM {LAST_RELEASE} as they are"
        ) from e
    for name in [k for k, v in config.parameters.items() if _PLACEHOLDER.fullmatch(v.string_value)]:
        del config.parameters[name]
    text = text_format.MessageToString(config)
    left = _PLACEHOLDER.search(text)
    if left is not None:
        raise ConfigError(
            f"{path} asks for {left[1]}, which saw-triton does not know: use the models of TensorRT-LLM {LAST_RELEASE}"
        )
    return "# Written by saw-triton: changes are lost when it runs again.\n" + text


def _protobuf() -> tuple[Any, Any]:
    try:
        from google.protobuf import text_format
        from tritonclient.grpc import model_config_pb2
    except ImportError as e:
        raise BackendUnavailableError(
            "tritonclient, which describes Triton's configuration, is not installed: pip install 'saw-trtllm[client]'"
        ) from e
    return text_format, model_config_pb2
