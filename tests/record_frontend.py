"""Record what TensorRT-LLM's front-end defines for a small Llama with a SAW cache, and a run of its executor on it.

    SAW_TENSORRT_LLM_SOURCE=DIR python tests/record_frontend.py OUTPUT_DIR

OUTPUT_DIR gets the network (:mod:`network_recording`) and the run (:mod:`recorded_run`), its logits computed by the
reference. Neither TensorRT, TensorRT-LLM nor a GPU is needed here; to play it back, neither PyTorch nor the source is.
"""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path

import fake_tensorrt
import fake_tensorrt_frontend
import network_recording
import recorded_run
import torch
from executor_contract import ALL, PRIMARY, SECONDARY, Executor
from hf_models import make_hf_model

from saw_trtllm.builder import BuildOptions, BuildPlan, build, plan_build
from saw_trtllm.reference.cache import PagedCache, StepPlan
from saw_trtllm.reference.model import ReferenceModel

NUM_STEPS = 80
#: Of the Llama: as near to a real one as a recording of some MiB allows.
MODEL = {
    "hidden_size": 256,
    "intermediate_size": 512,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "head_dim": 128,
    "vocab_size": 512,
    "max_position_embeddings": ALL,
}


def record(folder: Path, seed: int = 10) -> None:
    """Write both recordings."""
    with tempfile.TemporaryDirectory() as work, fake_tensorrt_frontend.frontend():
        fake_tensorrt.get_plugin_registry().saw = True
        model_dir = make_hf_model(Path(work), "llama", torch.float16, **MODEL)[0]
        limits = {"max_batch_size": 8, "max_num_tokens": 256, "max_seq_len": ALL}
        options = BuildOptions(
            model_dir=model_dir, output_dir=Path(work) / "engine", backend="tensorrt_llm", kv="saw_int4", **limits
        )
        plan = plan_build(options)
        build(plan)
        network_recording.save(fake_tensorrt.Builder.networks[-1], folder)
        record_run(plan, folder, seed)


def record_run(plan: BuildPlan, folder: Path, seed: int) -> None:
    """Plan the executor's steps and compute their logits."""
    config, model = plan.config, plan.config.pretrained_config
    layers, tokens = model.num_hidden_layers, config.build_config.tokens_per_block
    executor = Executor(
        [ALL] * layers,
        num_primary=22,
        num_secondary=14,
        tokens_per_block=tokens,
        max_seq_len=ALL,
        vocab_size=model.vocab_size,
        seed=seed,
    )
    reference = ReferenceModel(model, plan.load, ALL)
    cache = PagedCache(config.pools, executor.num_blocks[PRIMARY], model.num_key_value_heads, tokens)
    (pool,) = cache.pools
    pool.data.zero_()
    memory = {PRIMARY: pool.data.numpy()}
    memory[SECONDARY] = torch.zeros(executor.num_blocks[SECONDARY], *pool.data.shape[1:], dtype=torch.uint8).numpy()
    steps = []
    for _ in range(NUM_STEPS):
        step = executor.step()
        for copy in step.copies:
            copy.apply(memory)
        fed = step.for_reference(0, layers)
        logits = reference.forward(fed, cache).numpy()
        plan = StepPlan.make(fed, pool)
        slots = torch.stack([plan.write_blocks, plan.write_offsets], 1)
        rows = pool.data[plan.write_blocks, :, :, :, plan.write_offsets]
        steps.append(
            recorded_run.RecordedStep(step.copies, step.inputs, logits, slots.int().numpy(), rows.numpy().copy())
        )
    recorded_run.save(steps, {where: rows.shape for where, rows in memory.items()}, folder)


if __name__ == "__main__":
    record(Path(sys.argv[1]))
