"""vLLM's decode steps of the same shape as our engines', with dummy weights, in a process of its own."""

from __future__ import annotations

import json
import logging
import random
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

from benchmarks.common.vllm import CACHES, engine_arguments, import_vllm
from benchmarks.engine.record import Peer, PeerStep
from saw_trtllm.errors import EngineError
from saw_trtllm.model.config import ModelConfig

logger = logging.getLogger(__name__)

#: A step is the difference of two texts of so many tokens, by their number, each the faster of two tries: what a
#: request costs once drops out.
FEW, MANY, TRIES = 9, 105, 2


def measure_vllm(shape: ModelConfig, kv: str, qformat: str, steps: Sequence[tuple[int, int]]) -> Peer:
    """A cache's steps, measured in a child, which gives the GPU's memory back.

    Parameters
    ----------
    shape : ModelConfig
    kv : str
        Of :data:`benchmarks.common.vllm.CACHES`.
    qformat : str
        Of :data:`benchmarks.common.vllm.QUANTIZATIONS`.
    steps : sequence of (int, int)
        Batches and contexts.

    Raises
    ------
    EngineError
        If the child fails.
    """
    with tempfile.TemporaryDirectory(prefix="benchmarks-") as folder:
        job = {"folder": folder, "shape": shape.model_dump(mode="json"), "kv": kv, "qformat": qformat}
        job["steps"] = steps
        if subprocess.run([sys.executable, "-m", "benchmarks.engine.vllm", json.dumps(job)]).returncode:
            raise EngineError(f"vLLM's steps with {kv} could not be measured: see above")
        return Peer.model_validate_json(Path(folder, "peer.json").read_text())


def main() -> int:
    """The child's side of :func:`measure_vllm`."""
    job = json.loads(sys.argv[1])
    steps = [tuple(step) for step in job["steps"]]
    peer = _measure(Path(job["folder"]), ModelConfig(**job["shape"]), job["kv"], job["qformat"], steps)
    Path(job["folder"], "peer.json").write_text(peer.model_dump_json())
    return 0


def _measure(folder: Path, shape: ModelConfig, kv: str, qformat: str, steps: Sequence[tuple[int, int]]) -> Peer:
    vllm = import_vllm()
    batches, contexts = ({step[i] for step in steps} for i in range(2))
    llm = vllm.LLM(
        **engine_arguments(folder, shape, kv, qformat),
        max_model_len=max(contexts) + MANY,
        max_num_seqs=max(batches),
        gpu_memory_utilization=0.9,
        cudagraph_capture_sizes=sorted(batches),
    )
    rng = random.Random(0)
    prompts = [rng.choices(range(3, shape.vocab_size), k=max(contexts)) for _ in range(max(batches))]

    def seconds(batch: int, context: int, tokens: int) -> float:
        sampling = vllm.SamplingParams(max_tokens=tokens, temperature=0.0, ignore_eos=True, detokenize=False)
        asked = [{"prompt_token_ids": prompt[:context]} for prompt in prompts[:batch]]
        start = time.perf_counter()
        llm.generate(asked, sampling, use_tqdm=False)
        return time.perf_counter() - start

    measured = []
    # The longest prompts of a batch first: the prefix cache has the others then.
    for batch, context in sorted(steps, reverse=True):
        seconds(batch, context, FEW)
        few, many = (min(seconds(batch, context, tokens) for _ in range(TRIES)) for tokens in (FEW, MANY))
        measured.append(PeerStep(batch=batch, context=context, step_us=round(1e6 * (many - few) / (MANY - FEW), 1)))
    measured.sort(key=lambda step: (step.batch, step.context))
    return Peer(name=f"vLLM {vllm.__version__}", kv=kv, dtype=CACHES[kv][1], steps=measured)


if __name__ == "__main__":
    sys.exit(main())
