"""A TensorRT-LLM model with SAW attention: what is swapped in it, checked, and written of it."""

from __future__ import annotations

import copy
import functools
from typing import Any

import tensorrt as trt
import torch
from tensorrt_llm._common import default_net
from tensorrt_llm.layers.attention import Attention
from tensorrt_llm.models import PretrainedModel
from tensorrt_llm.network import Network
from tensorrt_llm.quantization.layers import Fp8RowwiseAttention

from saw_trtllm.backends.tensorrt_llm.attention import SawAttention
from saw_trtllm.backends.tensorrt_llm.checks import check_attention, check_build
from saw_trtllm.backends.tensorrt_llm.options import SwapOptions
from saw_trtllm.backends.tensorrt_llm.rewrite import rewrite_attention
from saw_trtllm.engine.config import SawSection
from saw_trtllm.engine.executor_view import SECTION, for_executor
from saw_trtllm.errors import ConfigError
from saw_trtllm.plugins.library import VERSION
from saw_trtllm.version import __version__

#: Inputs for TensorRT-LLM's attention that SAW's does without.
UNNEEDED_INPUTS = (
    *("context_lengths", "host_context_lengths", "host_past_key_value_lengths", "host_kv_cache_block_offsets"),
    *("cache_indirection", "host_sink_token_length", "host_runtime_perf_knobs", "host_context_progress"),
)

#: What the mixins below are mixed into, which a type checker is not to look at.
_TheirModel: Any = object
_TheirConfig: Any = object


class SawModel(_TheirModel):
    """Mixed into one of TensorRT-LLM's models, in front: its attention on a SAW cache.

    The model's ``config`` keeps its true values; what ``Engine.save`` writes of it is what the executor is to read.
    """

    config: Any

    def __post_init__(self) -> None:
        super().__post_init__()
        self.use_saw(SwapOptions.of_config(self.config))

    def use_saw(self, options: SwapOptions, rewrite: bool = False) -> None:
        """Swap the attention, or change the options of one that is swapped already.

        Parameters
        ----------
        options : SwapOptions
        rewrite : bool
            Leave the modules as they are and rewrite the network when it is defined.

        Raises
        ------
        ConfigError
            If a layer's attention is not one that the swap knows.
        """
        self._saw = options
        self._saw_rewrite = rewrite
        self.config = _with_section(self.config, _section(options))
        if not rewrite:
            swap_attention(self, options)

    def prepare_inputs(self, *args: Any, **kwargs: Any) -> dict[str, Any]:
        """Check the build, then declare the network's inputs."""
        if args:
            raise ConfigError("prepare_inputs of a swapped model takes its arguments by name: use tensorrt_llm.build")
        check_build(self.config, default_net().plugin_config, kwargs)
        return super().prepare_inputs(**kwargs)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Define the network, and clear it of what SAW's attention does not need."""
        outputs = super().forward(*args, **kwargs)
        if self._saw_rewrite:
            rewrite_attention(default_net(), self._saw, local_layers(self), self.config.mapping)
        drop_unneeded_inputs(default_net())
        return outputs

    def save_checkpoint(self, output_dir: str, save_config: bool = True) -> None:
        """Rejected: the weights may hold V's rotation, and the config an engine's row size."""
        raise ConfigError(f"a swapped model is no checkpoint to write to {output_dir}: save the model before the swap")


def swap(model: PretrainedModel, options: SwapOptions, rewrite: bool = False) -> PretrainedModel:
    """Put SAW attention into a model.

    Parameters
    ----------
    model : tensorrt_llm.models.PretrainedModel
        Before it is built. It is changed, and so is its class.
    options : SwapOptions
    rewrite : bool
        Swap by rewriting the network when it is defined, for a model whose attention is a class of its own that calls
        ``gpt_attention``.

    Returns
    -------
    tensorrt_llm.models.PretrainedModel
        The same model.

    Raises
    ------
    ConfigError
        If a layer's attention is not one that the swap knows.
    """
    if not isinstance(model, SawModel):
        cls = type(model)
        model.__class__ = type(f"Saw{cls.__name__}", (SawModel, cls), {})
    model.use_saw(options, rewrite)
    return model


def swap_attention(model: PretrainedModel, options: SwapOptions) -> None:
    """Put a ``SawAttention`` in the place of each attention of a model."""
    swapped, found = 0, []
    for name, module, parent in list(model.named_modules_with_parent()):
        if type(module) in (Attention, Fp8RowwiseAttention):
            found.append((name, module, parent))
        elif isinstance(module, SawAttention):
            module.options = options
            swapped += 1
        elif type(module).__name__.endswith("Attention"):
            raise ConfigError(f"{name} is {_describe(module)}")
    if not found and not swapped:
        raise ConfigError(
            f"the architecture {model.config.architecture} is unknown to the swap: it has no layer of TensorRT-LLM's "
            "class Attention; use swap(model, options, rewrite=True) if its layers call gpt_attention"
        )
    for name, module, _ in found:
        check_attention(name, module)
    layers = local_layers(model)
    for name, module, parent in found:
        number = layers[module.local_layer_idx]
        saw = SawAttention(module, number, options, getattr(model.config, "norm_epsilon", None))
        setattr(parent, name.rsplit(".", 1)[-1], saw)


def local_layers(model: PretrainedModel) -> list[int]:
    """Numbers in the whole model of this rank's layers."""
    return list(model.config.mapping.pp_layers(model.config.num_hidden_layers))


def drop_unneeded_inputs(network: Network) -> None:
    """Take those of :data:`UNNEEDED_INPUTS` out of a network that no layer consumes."""
    trt_network = network.trt_network
    layers = [trt_network.get_layer(i) for i in range(trt_network.num_layers)]
    tensors = [layer.get_input(i) for layer in layers for i in range(layer.num_inputs)]
    consumed = {t.name for t in tensors if t is not None}
    for name in UNNEEDED_INPUTS:
        if name in network._inputs and name not in consumed:
            trt_network.remove_tensor(network._inputs.pop(name).trt_tensor)


def _describe(module: Any) -> str:
    """What an attention is that the swap does not know, and what to do."""
    name = type(module).__name__
    if hasattr(module, "kv_lora_rank"):
        return (
            f"{name}, a multi-head latent attention (MLA), which has no keys and values to quantize: build without SAW"
        )
    return (
        f"{name}, an attention that the swap does not know: use swap(model, options, rewrite=True) if it calls "
        "gpt_attention"
    )


def _section(options: SwapOptions) -> dict[str, Any]:
    """The section ``saw_int4`` of the engine's ``config.json``."""
    capability = torch.cuda.get_device_capability() if torch.cuda.is_available() else None
    section = SawSection.of(options.kv_format, "tensorrt_llm", __version__).model_copy(
        update={
            "k_center": options.k_center is not None,
            "k_frame": options.k_frame is not None,
            "quantized": dict(options.quantized),
            "plugin_version": VERSION,
            "tensorrt_version": trt.__version__,
            "compute_capability": None if capability is None else "{}.{}".format(*capability),
        }
    )
    return section.model_dump(mode="json")


def _with_section(config: Any, section: dict[str, Any]) -> Any:
    """A copy of a config that writes itself as the executor is to read it."""
    config = copy.copy(config)
    config.__class__ = _engine_config_class(config.__class__)
    setattr(config, SECTION, section)
    return config


@functools.cache
def _engine_config_class(cls: type) -> type:
    if issubclass(cls, _EngineConfigMixin):
        return cls
    return type(f"Saw{cls.__name__}", (_EngineConfigMixin, cls), {})


class _EngineConfigMixin(_TheirConfig):
    """Only ``Engine.save`` and its like turn a model's config into a dict."""

    def to_dict(self) -> dict[str, Any]:
        return for_executor(super().to_dict())
