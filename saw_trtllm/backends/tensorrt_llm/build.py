"""``saw-build --backend tensorrt_llm``: TensorRT-LLM's builder on its own definitions."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import torch
from tensorrt_llm.builder import BuildConfig, build
from tensorrt_llm.models import PretrainedConfig
from tensorrt_llm.plugin import PluginConfig

from saw_trtllm.backends.tensorrt_llm.models import class_for
from saw_trtllm.checkpoint.tensorrt_llm import write_config
from saw_trtllm.engine.config import CONFIG_FILE, engine_file
from saw_trtllm.plan.folder import replacing_engine
from saw_trtllm.plan.plan import BuildPlan

_TIMING_CACHE = "model.cache"


def build_engines(plan: BuildPlan, progress: Callable[[str], None] | None = None) -> int:
    """Write the engines of all ranks.

    Parameters
    ----------
    plan : BuildPlan
        Of the backend ``tensorrt_llm``. Its folder is there.
    progress : callable, optional
        Called with the name of each tensor of each rank that has been read.

    Returns
    -------
    int
        Bytes of the engine files.
    """
    model = plan.config.pretrained_config
    cls, ranks = class_for(model), range(model.mapping.world_size)
    with replacing_engine(plan.output_dir, plan.checkpoint.folder) as part:
        for rank in ranks:
            if torch.cuda.is_available():
                torch.cuda.set_device(rank % torch.cuda.device_count())
            config = PretrainedConfig.from_dict(write_config(model, model.dtype, model.mapping.tp_size))
            config.set_rank(rank)
            engine = build(cls.from_plan(plan, config, progress), _build_config(plan, part))
            engine.save(str(part))
            del engine
        (part / _TIMING_CACHE).unlink(missing_ok=True)
        written = json.loads((part / CONFIG_FILE).read_text(encoding="utf-8"))
        written["build_config"]["output_timing_cache"] = _TIMING_CACHE  # not a folder that is gone
        (part / CONFIG_FILE).write_text(json.dumps(written, indent=2) + "\n", encoding="utf-8")
        return sum((part / engine_file(rank)).stat().st_size for rank in ranks)


def _build_config(plan: BuildPlan, folder: Path) -> BuildConfig:
    limits = plan.config.build_config
    plugin_config = PluginConfig()
    plugin_config.tokens_per_block = limits.tokens_per_block
    plugin_config.use_paged_context_fmha = True
    plugin_config.use_fp8_context_fmha = False  # which it would switch on for an FP8 model
    return BuildConfig(
        max_batch_size=limits.max_batch_size,
        max_input_len=limits.max_input_len,
        max_seq_len=limits.max_seq_len,
        max_num_tokens=limits.max_num_tokens,
        max_beam_width=limits.max_beam_width,
        gather_context_logits=limits.gather_context_logits,
        gather_generation_logits=limits.gather_generation_logits,
        output_timing_cache=str(folder / _TIMING_CACHE),
        plugin_config=plugin_config,
    )
