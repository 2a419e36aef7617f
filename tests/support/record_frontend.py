"""Record what TensorRT-LLM's front-end defines for small models with a SAW cache, and a run of its executor on each.

    SAW_TENSORRT_LLM_SOURCE=DIR python -m tests.support.record_frontend OUTPUT_DIR

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

import numpy as np
import torch
import torch.nn.functional as F

from saw_trtllm.backends.reference.cache import PagedCache, StepPlan
from saw_trtllm.backends.reference.model import ReferenceModel, calibrated_inputs
from saw_trtllm.backends.tensorrt_llm.options import SwapOptions
from saw_trtllm.build import build, plan_build
from saw_trtllm.calibrate import calibrate
from saw_trtllm.checkpoint import Checkpoint, save_checkpoint
from saw_trtllm.engine.pools import Pool
from saw_trtllm.engine.step import StepInputs
from saw_trtllm.plan.options import BuildOptions
from saw_trtllm.plan.plan import BuildPlan
from tests.support import network_recording, recorded_run
from tests.support.executor.blocks import PRIMARY, SECONDARY
from tests.support.executor.contract import ALL, Executor, Step
from tests.support.fakes import tensorrt as fake_tensorrt
from tests.support.fakes import tensorrt_frontend as fake_tensorrt_frontend
from tests.support.models import make_hf_model

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
        windows = torch.randint(0, _MODEL["vocab_size"], (4, 128), generator=torch.Generator().manual_seed(0))
        options["calibration"] = work / "calibration.safetensors"
        calibrate(Checkpoint.open(model_dir), windows).save(options["calibration"])
    plan = plan_build(BuildOptions(**options, **_LIMITS))
    if way != "swap":
        build(plan)
        return plan
    swap = importlib.import_module("saw_trtllm.backends.tensorrt_llm.model").swap
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
        model = config.model_copy(update={"sliding_window": least})
        super().__init__(model, plan.weights.load, ALL, **calibrated_inputs(plan.config, plan.weights.load))
        self.plans: list[StepPlan] = []


def _half(x: torch.Tensor) -> torch.Tensor:
    return x.half().float()


class _HalfReference(_Reference):
    """The same with each tensor rounded to 16 bits, as those of an engine are: how far off may that be?"""

    def forward(self, step, cache):
        x = F.embedding(torch.from_numpy(step.input_ids).long(), self._embedding)
        for i, w in enumerate(self._layers):
            x = _half(x + self._attention(i, w, self._norm(x, w["input_layernorm.weight"]), self.plans, cache))
            y = self._norm(x, w["post_layernorm.weight"])
            gate, up = (_half(F.linear(y, w[f"mlp.{name}.weight"])) for name in ("fc", "gate"))
            y = _half(_half(gate * _half(torch.sigmoid(gate))) * up)
            x = _half(x + _half(F.linear(y, w["mlp.proj.weight"])))
        x = self._norm(x[torch.from_numpy(step.last_token_ids).long() - 1], self._ln_f)
        return _half(F.linear(x, self._lm_head))

    def _norm(self, x, weight):
        normed = x * torch.rsqrt(x.square().mean(-1, keepdim=True) + self.config.norm_epsilon)
        return _half(_half(normed) * weight)

    def _attention(self, layer, w, x, plans, cache):
        return _half(super()._attention(layer, w, x, plans, cache)[: len(x)])


class _Run:
    """A model and its pools, through the steps of a run."""

    def __init__(self, model: _Reference, plan: BuildPlan, executor: Executor) -> None:
        self.model = model
        pools = [Pool(plan.config.kv_format, layers, i, i) for i, layers in enumerate(executor.layers)]
        heads = plan.config.pretrained_config.num_key_value_heads
        self.cache = PagedCache(pools, executor.num_blocks[PRIMARY], heads, executor.tokens_per_block)
        self.memory = []
        for pool in self.cache.pools:
            pool.data.zero_()
            secondary = np.zeros((executor.num_blocks[SECONDARY], *pool.data.shape[1:]), np.uint8)
            self.memory.append({PRIMARY: pool.data.numpy(), SECONDARY: secondary})

    def logits(self, step: Step, fed: Sequence[StepInputs]) -> np.ndarray:
        for copy in step.copies:
            copy.apply(self.memory[copy.pool])
        plans = [StepPlan.make(x, pool) for x, pool in zip(fed, self.cache.pools, strict=True)]
        self.model.plans, self.cache.plans = plans, lambda step: plans
        with torch.inference_mode():
            return self.model.forward(fed[0], self.cache).numpy()


def _record_run(plan: BuildPlan, windows: Sequence[int], folder: Path) -> None:
    """Plan the executor's steps and compute what is due."""
    limits = {"num_primary": 22, "num_secondary": 14, "max_seq_len": ALL}
    limits["tokens_per_block"] = plan.config.build_config.tokens_per_block
    executor = Executor(windows, vocab_size=plan.config.pretrained_config.vocab_size, seed=10, **limits)
    exact = _Run(_Reference(plan, windows), plan, executor)
    half = {name: _Run(_HalfReference(plan, windows), plan, executor) for name in recorded_run.MODES}
    steps, rounded = [], {name: [] for name in half}
    for _ in range(NUM_STEPS):
        step = executor.step()
        fed = [step.for_reference(p, len(layers)) for p, layers in enumerate(executor.layers)]
        logits = exact.logits(step, fed)
        slots = np.stack([np.stack([x.write_blocks, x.write_offsets], 1) for x in exact.model.plans]).astype(np.int32)
        pools = [memory[PRIMARY] for memory in exact.memory]
        rows = np.stack([pools[p][slots[p, :, 0], i, :, :, slots[p, :, 1]] for p, i in executor.mapping], 1)
        for name, run in half.items():
            rounded[name].append(run.logits(step, fed))
        for mine, pool in zip(half[recorded_run.STEP_BY_STEP].cache.pools, exact.cache.pools, strict=True):
            mine.data.copy_(pool.data)
        steps.append(recorded_run.RecordedStep(step.copies, step.inputs, logits, slots, rows))
    shapes = [{where: rows.shape for where, rows in memory.items()} for memory in exact.memory]
    recorded_run.save(steps, shapes, rounded, folder)


if __name__ == "__main__":
    if fake_tensorrt_frontend.missing() is not None:
        sys.exit(fake_tensorrt_frontend.missing())
    record(Path(sys.argv[1]))
