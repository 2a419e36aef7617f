"""Record what TensorRT-LLM's front-end defines for small models with a SAW cache, and a run of its executor on each.

    SAW_TENSORRT_LLM_SOURCE=DIR python tests/record_frontend.py OUTPUT_DIR

OUTPUT_DIR gets a folder for each case, with the network (:mod:`network_recording`) and the run (:mod:`recorded_run`),
whose results the reference computes. Neither TensorRT, TensorRT-LLM nor a GPU is needed here; to play it back, neither
PyTorch nor the source is.
"""

from __future__ import annotations

import importlib
import sys
import tempfile
import types
from collections.abc import Sequence
from pathlib import Path

import fake_tensorrt
import fake_tensorrt_frontend
import network_recording
import numpy as np
import recorded_run
import torch
from executor_blocks import PRIMARY, SECONDARY
from executor_contract import ALL, Executor
from hf_models import make_hf_model

from saw_trtllm.builder import BuildOptions, BuildPlan, build, plan_build
from saw_trtllm.calibration import calibrate
from saw_trtllm.checkpoint import Checkpoint, save_checkpoint
from saw_trtllm.engine import k_center_name
from saw_trtllm.reference.cache import PagedCache, StepPlan
from saw_trtllm.reference.model import ReferenceModel
from saw_trtllm.trtllm.options import SwapOptions

NUM_LAYERS = 2
_MODEL = {"hidden_size": 128, "intermediate_size": 256, "vocab_size": 256, "max_position_embeddings": ALL}
_MODEL["num_hidden_layers"] = NUM_LAYERS
_WIDE = {"head_dim": 128, "num_attention_heads": 4}
_LIMITS = {"max_batch_size": 8, "max_num_tokens": 256, "max_seq_len": ALL}
#: Family, fields of its config, how TensorRT-LLM comes to define it, and the run's window of each layer. It is defined
#: by saw-build, with a calibration or without, or by swap() in a model of TensorRT-LLM's own, whose V is rotated at run
#: time.
CASES = {
    "llama": ("llama", _WIDE, "build", [ALL, ALL]),
    "llama-swapped": ("llama", _WIDE, "swap", [ALL, ALL]),
    "mistral": ("mistral", {"sliding_window": 40}, "build", [ALL, 24]),
    "qwen2": ("qwen2", {}, "build", [ALL, ALL]),
    "qwen3-calibrated": ("qwen3", _WIDE, "calibrate", [64, ALL]),
}
NUM_STEPS = 60


def record(folder: Path, cases: Sequence[str] = tuple(CASES)) -> None:
    """Write the recordings of some cases."""
    with fake_tensorrt_frontend.frontend() as frontend:
        fake_tensorrt.get_plugin_registry().saw = True
        for name in cases:
            family, fields, way, windows = CASES[name]
            with tempfile.TemporaryDirectory() as work:
                model_dir = make_hf_model(Path(work), family, torch.float16, **_MODEL, **fields)[0]
                plan = _define(frontend, model_dir, Path(work), way)
                network_recording.save(fake_tensorrt.Builder.networks[-1], folder / name)
                _record_run(plan, windows, folder / name)


def _define(frontend: types.SimpleNamespace, model_dir: Path, work: Path, way: str) -> BuildPlan:
    """Have the front-end build an engine; the plan is the reference's in any case."""
    options = {"model_dir": model_dir, "output_dir": work / "engine", "backend": "tensorrt_llm", "kv": "saw_int4"}
    if way == "calibrate":
        windows = torch.randint(0, _MODEL["vocab_size"], (4, 64), generator=torch.Generator().manual_seed(0))
        options["calibration"] = work / "calibration.safetensors"
        calibrate(Checkpoint.open(model_dir), windows).save(options["calibration"])
    plan = plan_build(BuildOptions(**options, **_LIMITS))
    if way != "swap":
        build(plan)
        return plan
    swap = importlib.import_module("saw_trtllm.trtllm.model").swap
    save_checkpoint(Checkpoint.open(model_dir), work / "ckpt")
    config = frontend.models.PretrainedConfig.from_json_file(str(work / "ckpt" / "config.json"))
    model = frontend.models.MODEL_MAP[config.architecture].from_checkpoint(str(work / "ckpt"), config=config)
    swap(model, SwapOptions(plan.config.kv_format))
    cache = str(work / "model.cache")
    frontend.builder.build(model, frontend.builder.BuildConfig(output_timing_cache=cache, **_LIMITS))
    return plan


class _Reference(ReferenceModel):
    """The reference with a table of blocks for each pool, and the windows of a run."""

    def __init__(self, plan: BuildPlan, windows: Sequence[int]) -> None:
        config = plan.config.pretrained_config
        own = [config.window(i) or ALL for i in range(len(windows))]
        least = [min(pair) for pair in zip(own, windows, strict=True)]
        center = None
        if plan.calibration is not None:
            center = torch.from_numpy(np.stack([plan.load(k_center_name(i)) for i in range(len(windows))]))
        super().__init__(config.model_copy(update={"sliding_window": least}), plan.load, ALL, center)
        self.plans: list[StepPlan] = []

    def _attention(self, layer, w, x, plan, cache):
        pool, _ = cache.place(layer)
        return super()._attention(layer, w, x, self.plans[cache.pools.index(pool)], cache)


def _record_run(plan: BuildPlan, windows: Sequence[int], folder: Path) -> None:
    """Plan the executor's steps and compute what is due."""
    config, model = plan.config, plan.config.pretrained_config
    tokens = config.build_config.tokens_per_block
    limits = {"num_primary": 22, "num_secondary": 14, "tokens_per_block": tokens, "max_seq_len": ALL}
    executor = Executor(windows, vocab_size=model.vocab_size, seed=10, **limits)
    reference = _Reference(plan, windows)
    pools = [(config.kv_format, layers) for layers in executor.layers]
    cache = PagedCache(pools, executor.num_blocks[PRIMARY], model.num_key_value_heads, tokens)
    memory = []
    for pool in cache.pools:
        pool.data.zero_()
        secondary = np.zeros((executor.num_blocks[SECONDARY], *pool.data.shape[1:]), np.uint8)
        memory.append({PRIMARY: pool.data.numpy(), SECONDARY: secondary})
    steps = []
    for _ in range(NUM_STEPS):
        step = executor.step()
        for copy in step.copies:
            copy.apply(memory[copy.pool])
        fed = [step.for_reference(p, len(layers)) for p, layers in enumerate(executor.layers)]
        reference.plans = [StepPlan.make(x, pool) for x, pool in zip(fed, cache.pools, strict=True)]
        logits = reference.forward(fed[0], cache).numpy()
        slots = np.stack([np.stack([x.write_blocks, x.write_offsets], 1) for x in reference.plans]).astype(np.int32)
        rows = np.stack([memory[p][PRIMARY][slots[p, :, 0], i, :, :, slots[p, :, 1]] for p, i in executor.mapping], 1)
        steps.append(recorded_run.RecordedStep(step.copies, step.inputs, logits, slots, rows))
    recorded_run.save(steps, [{where: rows.shape for where, rows in m.items()} for m in memory], folder)


if __name__ == "__main__":
    record(Path(sys.argv[1]))
