"""The supported families as classes for ``trtllm-build --model_cls_file model_cls.py --model_cls_name NAME``."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import torch
from tensorrt_llm.models import GemmaForCausalLM, LLaMAForCausalLM, PretrainedConfig, QWenForCausalLM
from tensorrt_llm.models.modeling_utils import preprocess_weights

from saw_trtllm.backends.tensorrt_llm.limits import TensorRTLLMLimits
from saw_trtllm.backends.tensorrt_llm.model import SawModel
from saw_trtllm.backends.tensorrt_llm.options import CheckpointSection, SwapOptions
from saw_trtllm.checkpoint import cast, shard
from saw_trtllm.checkpoint.families import family_of
from saw_trtllm.checkpoint.layout import check_tp_size, shard_weight
from saw_trtllm.checkpoint.quantization.tensorrt_llm import with_one_scale, written_section
from saw_trtllm.checkpoint.quantization.tensorrt_llm import write as write_quantized
from saw_trtllm.errors import ConfigError
from saw_trtllm.model.config import ModelConfig
from saw_trtllm.model.quantization import QuantizedWeight
from saw_trtllm.plan.plan import BuildPlan, make_plan


class SawDecoder(SawModel):
    """A supported family: its weights take in V's rotation or frame as they are read."""

    @classmethod
    def from_checkpoint(
        cls, ckpt_dir: str, rank: int | None = None, config: PretrainedConfig | None = None, **unsupported: Any
    ) -> SawDecoder:
        """Make a rank's model of a TensorRT-LLM checkpoint.

        Parameters
        ----------
        ckpt_dir : str
            Of the whole model; the section ``saw_int4`` of its ``config.json`` says how to cache
            (:class:`saw_trtllm.backends.tensorrt_llm.options.CheckpointSection`).
        rank : int, optional
            By default ``config``'s.
        config : PretrainedConfig, optional
            By default the checkpoint's.
        **unsupported
            Must be unset.

        Raises
        ------
        CheckpointError, ConfigError
            If the checkpoint is not one of this family, or something of it is not supported.
        """
        given = sorted(name for name, value in unsupported.items() if value is not None)
        if given:
            raise ConfigError(f"{', '.join(given)} cannot be combined with {cls.__name__}: leave it out")
        folder = Path(ckpt_dir)
        if config is None:
            config = PretrainedConfig.from_json_file(str(folder / "config.json"))
        if rank is not None:
            config.set_rank(rank)
        backend = TensorRTLLMLimits()
        plan = make_plan(CheckpointSection.of(config).build_options(folder), backend, backend.available())
        return cls.from_plan(plan, config)

    @classmethod
    def from_plan(
        cls, plan: BuildPlan, config: PretrainedConfig, progress: Callable[[str], None] | None = None
    ) -> SawDecoder:
        """Make a rank's model with the weights of a build plan.

        Parameters
        ----------
        plan : BuildPlan
        config : PretrainedConfig
            With the rank set.
        progress : callable, optional
            Called with the name of each tensor that has been read.
        """
        if not isinstance(config, cls.config_class):
            right = class_for(plan.config.pretrained_config).__name__
            raise ConfigError(f"{cls.__name__} cannot build a {config.architecture}: give --model_cls_name {right}")
        config = copy.copy(config)
        config.saw_int4 = None  # the plan has it
        tp_size = config.mapping.tp_size
        formats = plan.config.saw_int4.quantized
        section = written_section(formats, plan.config.pretrained_config, tp_size)
        config.quantization = type(config.quantization)(**section)
        weights = rank_weights(plan, tp_size, config.mapping.tp_rank, progress)
        if formats:
            # Puts them into the order of this GPU's kernels.
            weights = preprocess_weights(weights, config)
        model = cls(config)
        model.use_saw(SwapOptions.of_plan(plan))
        model.load(weights)
        return model


class SawLLaMAForCausalLM(SawDecoder, LLaMAForCausalLM):
    """Llama 2 and 3, and what has their architecture."""


class SawMistralForCausalLM(SawLLaMAForCausalLM):
    """Mistral: to TensorRT-LLM a Llama. Its sliding windows are in the engine, so none need be set at run time."""


class SawQWenForCausalLM(SawDecoder, QWenForCausalLM):
    """Qwen2 and 2.5, and Qwen3 with the epsilon of its q/k norm as the checkpoint has it."""


class SawGemmaForCausalLM(SawDecoder, GemmaForCausalLM):
    """Gemma 2 and 3, with the window of each layer in the engine."""


#: By name.
CLASSES: dict[str, type[SawDecoder]] = {
    cls.__name__: cls for cls in (SawLLaMAForCausalLM, SawQWenForCausalLM, SawMistralForCausalLM, SawGemmaForCausalLM)
}


def class_for(model: ModelConfig) -> type[SawDecoder]:
    """The class of a supported family."""
    return CLASSES[family_of(model).trtllm_class]


def rank_weights(
    plan: BuildPlan, tp_size: int, tp_rank: int, progress: Callable[[str], None] | None = None
) -> dict[str, torch.Tensor]:
    """A rank's part of all weights, with all that is folded in, as a checkpoint of TensorRT-LLM names and packs them.

    A tied ``lm_head`` is written out.
    """
    model = plan.config.pretrained_config
    check_tp_size(model, tp_size)
    weights: dict[str, torch.Tensor] = {}
    for name in plan.checkpoint.names():
        weight = plan.weights.load(name)
        if isinstance(weight, QuantizedWeight):
            part = shard_weight(name, with_one_scale(name, weight, model), model, tp_size, tp_rank)
            arrays = write_quantized(name, part, model.dtype)
        else:
            # Its norms compute in the model's dtype, and ours in fp32.
            array = cast(weight, model.dtype, plan.checkpoint.where(name))
            arrays = {name: shard(name, array, model, tp_size, tp_rank)}
        weights |= {written: _to_torch(np.ascontiguousarray(array)) for written, array in arrays.items()}
        if progress is not None:
            progress(name)
    return weights


def _to_torch(array: np.ndarray) -> torch.Tensor:
    if array.dtype == ml_dtypes.bfloat16:
        return torch.from_numpy(array.view(np.int16)).view(torch.bfloat16)
    if array.dtype == ml_dtypes.float8_e4m3fn:
        return torch.from_numpy(array.view(np.uint8)).view(torch.float8_e4m3fn)
    return torch.from_numpy(array)
