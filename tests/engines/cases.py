"""The engines that the tests run, and the steps that they are put through."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from saw_trtllm.build import build, plan_build
from saw_trtllm.checkpoint.calibration import Calibration
from saw_trtllm.engine.config import EngineConfig
from saw_trtllm.engine.step import DECODE, PREFILL, PoolLayout, StepInputs, StepPacker, StepSequence
from saw_trtllm.plan.options import BuildOptions
from saw_trtllm.plan.plan import BuildPlan
from saw_trtllm.plan.tensorrt_options import NetworkOptions
from tests.engines.models import FAMILIES, VOCAB, make_model
from tests.support import ROOT
from tests.support.frames import random_frames
from tests.support.locks import one_process

EXAMPLE = ROOT / "examples" / "tiny_llama"
TOKENS_PER_BLOCK = 32
NUM_BLOCKS = 24
_LIMITS = {"max_batch_size": 16, "max_num_tokens": 512, "max_seq_len": 512, "tokens_per_block": TOKENS_PER_BLOCK}


@dataclass(frozen=True)
class Case:
    """An engine: a random model of a family and head_dim, or the example's.

    TensorRT builds it at its lowest level, which takes the first kernels that it finds. The option ``centred`` gives
    it centers of keys, ``framed`` frames of keys, queries and values too; ``gemm_plugin`` is the builder's.
    """

    family: str
    head_dim: int
    kv: str
    options: tuple[tuple[str, Any], ...] = field(default=())

    @property
    def dtype(self) -> str:
        """Of the engine's activations."""
        return dict(self.options).get("dtype", "float16")

    @property
    def name(self) -> str:
        name = "-".join(map(str, (self.family, self.head_dim, self.kv, *(v for _, v in self.options))))
        return name.replace("/", "_")  # it is a folder's too

    def plan(self, folder: Path, backend: str) -> BuildPlan:
        """The plan of its engine in ``folder / name / backend``."""
        options = {**_LIMITS, "model_dir": self._model(folder), "dtype": "float16", **dict(self.options)}
        centred, framed = options.pop("centred", False), options.pop("framed", False)
        gemm_plugin = options.pop("gemm_plugin", "auto")
        plan = plan_build(BuildOptions(**options, output_dir=folder / self.name / backend, kv=self.kv, backend=backend))
        plan = _calibrated(plan, framed) if centred or framed else plan
        cache = folder / "timing.cache"
        cache = cache if cache.is_file() else None
        network = NetworkOptions(optimization_level=0, input_timing_cache=cache, gemm_plugin=gemm_plugin)
        return dataclasses.replace(plan, network=network)

    def _model(self, folder: Path) -> Path:
        """The checkpoint, made unless it is there."""
        if self.family == "example":
            return EXAMPLE
        made = folder / self.name / "model"
        with one_process(made.with_suffix(".lock")):
            return made if made.is_dir() else make_model(made, self.family, self.head_dim)

    def engine(self, folder: Path, backend: str = "tensorrt") -> Path:
        """The engine folder, built unless it is there."""
        made = folder / self.name / backend
        with one_process(made.with_suffix(".lock")):
            if not (made / "config.json").is_file():
                build(self.plan(folder, backend))
        return made


def _calibrated(plan: BuildPlan, framed: bool) -> BuildPlan:
    """A plan with random centers, and random frames if asked for, in the shapes of saw-calibrate's."""
    model = plan.config.pretrained_config
    shape = (model.num_hidden_layers, model.num_key_value_heads, model.head_size)
    centers = np.random.default_rng(5).standard_normal(shape).astype(np.float32)
    k_frame, v_frame = (random_frames(shape[:2], shape[2], seed, condition=4.0)[0] for seed in (1, 2))
    section = plan.config.saw_int4.model_copy(update={"k_center": True, "k_frame": framed})
    config = plan.config.model_copy(update={"saw_int4": section})
    return dataclasses.replace(plan, config=config, calibration=Calibration(centers, k_frame, v_frame, {}, {}, 0))


#: TensorRT 8.6 has no bfloat16.
_BF16 = (("dtype", "bfloat16"),)
KVS = ("saw_int4", "int4", "fp16")


def _each_once() -> list[Case]:
    """Each family with each kv and each head_dim, in a third of the combinations."""
    kvs, dims = KVS, (64, 128, 256)
    turned = [(f, dims[i], kvs[(i + j) % 3]) for j, f in enumerate(FAMILIES) for i in range(3)]
    every = [(f, d, k) for f in FAMILIES for d in dims for k in kvs]
    return [Case(*x) for x in (every if os.environ.get("SAW_TEST_ALL_ENGINES") == "1" else turned)]


STEP_CASES = [
    *_each_once(),
    Case("mistral", 128, "saw_int4", (("gather_context_logits", True),)),
    Case("llama", 128, "saw_int4", (("kv_skip_layers", "last"), ("centred", True))),
    Case("llama", 64, "saw_int4", (("kv_skip_layers", "last"), ("framed", True))),
    Case("qwen3", 128, "saw_int4", (("framed", True), *_BF16)),
    Case("llama", 128, "saw_k8v4", (("framed", True),)),
    Case("qwen2", 64, "saw_int4", (("kv_bits", "8/4:last"),)),
    Case("llama", 128, "saw_int4", (("gemm_plugin", "disable"),)),
    *(Case(f, d, kv, _BF16) for f, d, kv in zip(FAMILIES, (128, 64, 256, 128, 64, 256), KVS + KVS, strict=True)),
    Case("llama", 64, "saw_int4", (*_BF16, ("gemm_plugin", "disable"))),
    Case("llama", 128, "saw_int4", (("qformat", "int4_wo"),)),
    Case("qwen3", 128, "saw_int4", (("qformat", "fp8"), *_BF16)),
]
#: Engines of several ranks.
RANK_CASES = [
    Case("llama", 64, "saw_int4", (("tp_size", 2), ("framed", True))),
    Case("qwen2", 128, "saw_int4", (("tp_size", 2),)),
    Case("qwen3", 128, "int4", (("tp_size", 2), *_BF16)),
    Case("gemma2", 64, "saw_int4", (("tp_size", 2), ("gemm_plugin", "disable"))),
    Case("mistral", 128, "saw_int4", (("tp_size", 2),)),
    Case("mistral", 64, "fp16", (("tp_size", 4),)),
    Case("llama", 64, "saw_int4", (("tp_size", 8),)),
    Case("llama", 128, "saw_int4", (("tp_size", 2), ("qformat", "int4_wo"))),
    Case("qwen3", 128, "saw_int4", (("tp_size", 2), ("qformat", "fp8"), *_BF16)),
]
_SERVED = (("max_batch_size", 64), ("max_num_tokens", 4096), ("max_seq_len", 1024), ("gather_all_token_logits", True))
SERVED_CASES = {kv: Case("example", 128, kv, _SERVED) for kv in KVS} | {
    f"{kv}, bfloat16": Case("example", 128, kv, (*_SERVED, *_BF16)) for kv in ("saw_int4", "fp16")
}

IDS = np.random.default_rng(3).integers(3, VOCAB, (3, 190)).tolist()
#: What a step takes: sequence, first token, count, kind.
STEPS = {
    "prefill": [(0, 0, 70, PREFILL)],
    "chunk after history": [(0, 70, 40, PREFILL), (1, 0, 5, PREFILL)],
    "decode": [(0, 110, 1, DECODE), (1, 5, 1, DECODE)],
    "mixed": [(2, 0, 80, PREFILL), (1, 6, 60, PREFILL), (0, 111, 1, DECODE)],
    "decodes": [(0, 112, 1, DECODE), (1, 66, 1, DECODE), (2, 80, 1, DECODE)],
}
_BLOCKS = [[6, 1, 5, 0, 3, 20], [9, 2, 14, 13, 4, 21], [7, 8, 10, 11, 12, 22]]


def pack(name: str, layout: PoolLayout) -> StepInputs:
    """A step, for an engine's pools."""
    parts = [StepSequence(IDS[i][a : a + n], a, 60, kind, layout.entries(_BLOCKS[i])) for i, a, n, kind in STEPS[name]]
    return StepPacker(layout).pack(parts)


def num_tokens(config: EngineConfig) -> int:
    """Tokens of a cache that has the steps' blocks."""
    needed = config.tokens_of_blocks(NUM_BLOCKS * config.pool_layout.num_tables)
    return max(NUM_BLOCKS * TOKENS_PER_BLOCK, needed + config.build_config.max_seq_len)


def tolerances(
    name: str, config: EngineConfig, pools: list[np.ndarray], rounding: float, after: float
) -> list[np.ndarray]:
    """How far each row of each region may be off after a step.

    It is ``after`` where a layer writes what comes of codes that the one before has read, of tokens that are decoded.
    """
    found = [np.full(pool.shape[:-1], rounding) for pool in pools]
    tables = config.pool_layout.num_tables
    for pool in config.pools:
        places = [place for place, layer in enumerate(pool.layers) if layer > 0]
        for i, a, _, kind in STEPS[name]:
            if kind == DECODE:
                block = _BLOCKS[i][a // TOKENS_PER_BLOCK] * tables + pool.table
                found[pool.region][block, places, ..., a % TOKENS_PER_BLOCK] = after
    return found


#: Greedy texts of the example model: how many, tokens of each, and blocks that hold a prompt and them.
TEXTS, TEXT_TOKENS, TEXT_BLOCKS = 8, 200, 16


def text_steps(layout: PoolLayout, tokens: np.ndarray) -> Iterator[StepInputs]:
    """The texts' prompts in one step, and then a token of each in a step.

    ``tokens`` ``[TEXTS, TEXT_TOKENS]`` may be filled in as the steps are computed.
    """
    texts = prompts(TEXTS, TEXT_BLOCKS * TOKENS_PER_BLOCK - TEXT_TOKENS)
    blocks = [layout.entries(row) for row in np.arange(TEXTS * TEXT_BLOCKS).reshape(TEXTS, TEXT_BLOCKS)]
    parts = [StepSequence(text, 0, len(text), PREFILL, blocks[i]) for i, text in enumerate(texts)]
    yield StepPacker(layout).pack(parts)
    for n in range(TEXT_TOKENS - 1):
        yield StepPacker(layout).pack(
            [
                StepSequence([int(tokens[i, n])], len(text) + n, len(text), DECODE, blocks[i])
                for i, text in enumerate(texts)
            ]
        )


def prompts(count: int, longest: int, seed: int = 7) -> list[list[int]]:
    """Text that the example model was made for, cut at random places to random lengths."""
    rng = np.random.default_rng(seed)
    text = _example_text()
    found = []
    for _ in range(count):
        start, length = int(rng.integers(0, len(text) - longest)), int(rng.integers(2, longest))
        found.append(text[start : start + length])
    return found


def _example_text() -> list[int]:
    from saw_trtllm.runtime.tokenizer import Tokenizer

    return Tokenizer.load(EXAMPLE).encode((ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8"))
