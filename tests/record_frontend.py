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
from executor_contract import ALL, PRIMARY, SECONDARY, Executor
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
#: Family, fields of its config, and how TensorRT-LLM comes to define it: by saw-build, with a calibration or without,
#: or by swap() in a model of TensorRT-LLM's own, whose V is then rotated at run time.
CASES = {
    "llama": ("llama", _WIDE, "build"),
    "llama-swapped": ("llama", _WIDE, "swap"),
    "mistral": ("mistral", {"sliding_window": 40}, "build"),
    "qwen2": ("qwen2", {}, "build"),
    "qwen3-calibrated": ("qwen3", _WIDE, "calibrate"),
}
NUM_STEPS = 60


def record(folder: Path, cases: Sequence[str] = tuple(CASES)) -> None:
    """Write the recordings of some cases."""
    with fake_tensorrt_frontend.frontend() as frontend:
        fake_tensorrt.get_plugin_registry().saw = True
        for name in cases:
            family, fields, way = CASES[name]
            with tempfile.TemporaryDirectory() as work:
                model_dir = make_hf_model(Path(work), family, torch.float16, **_MODEL, **fields)[0]
                plan = _define(frontend, model_dir, Path(work), way)
                network_recording.save(fake_tensorrt.Builder.networks[-1], folder / name)
                _record_run(plan, folder / name)


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


def _record_run(plan: BuildPlan, folder: Path) -> None:
    """Plan the executor's steps and compute what is due."""
    config, model = plan.config, plan.config.pretrained_config
    layers, tokens = model.num_hidden_layers, config.build_config.tokens_per_block
    executor = Executor(
        [ALL] * layers,
        num_primary=22,
        num_secondary=14,
        tokens_per_block=tokens,
        max_seq_len=ALL,
        vocab_size=model.vocab_size,
        seed=10,
    )
    center = None
    if plan.calibration is not None:
        center = torch.from_numpy(np.stack([plan.load(k_center_name(i)) for i in range(layers)]))
    reference = ReferenceModel(model, plan.load, ALL, center)
    cache = PagedCache(config.pools, executor.num_blocks[PRIMARY], model.num_key_value_heads, tokens)
    (pool,) = cache.pools
    pool.data.zero_()
    memory = {PRIMARY: pool.data.numpy()}
    memory[SECONDARY] = np.zeros((executor.num_blocks[SECONDARY], *pool.data.shape[1:]), np.uint8)
    steps = []
    for _ in range(NUM_STEPS):
        step = executor.step()
        for copy in step.copies:
            copy.apply(memory)
        fed = step.for_reference(0, layers)
        logits = reference.forward(fed, cache).numpy()
        at = StepPlan.make(fed, pool)
        slots = torch.stack([at.write_blocks, at.write_offsets], 1).int().numpy()
        rows = pool.data[at.write_blocks, :, :, :, at.write_offsets].numpy()
        steps.append(recorded_run.RecordedStep(step.copies, step.inputs, logits, slots, rows))
    recorded_run.save(steps, {where: rows.shape for where, rows in memory.items()}, folder)


if __name__ == "__main__":
    record(Path(sys.argv[1]))
