"""Layers of plugins under TensorRT-LLM's executor, as :mod:`executor_contract` plays it, against the CPU reference.

Many steps of one run: prefills, chunks after history, decodes and all of them at once; blocks that are shared, reused
in part, sent to the host and brought back, left by a window, and taken from a sequence that comes again later.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass

import numpy as np
import pytest
import torch

from saw_trtllm.backends.reference.cache import K, PagedPool, StepPlan, V
from saw_trtllm.backends.reference.int4 import decode_rows
from saw_trtllm.backends.reference.paged_attention import paged_attention
from saw_trtllm.backends.reference.rotate_quantize_kv import rotate_quantize_kv
from saw_trtllm.format import ROW_TAIL_BYTES, KVFormat
from tests.support.executor.blocks import PRIMARY, SECONDARY, Copy
from tests.support.executor.contract import ALL, NUM_STEPS, Executor, make_executor
from tests.support.executor.contract import Step as ExecutorStep
from tests.support.steps import DTYPES, assert_near
from tests.support.tolerance import changed_bytes, most_changed_bytes, rotated_rounding, spacing

pytestmark = pytest.mark.gpu

HEADS = (8, 2)
OUTPUTS = ("q", "k", "v", "context")
#: Format, and which of the runs.
CASES = [
    ("saw_int4", 128, "float16", "one pool"),
    ("saw_int4", 128, "bfloat16", "two windows"),
    ("saw_int4", 64, "float16", "small blocks"),
    ("int4", 128, "float16", "large blocks"),
    ("fp16", 128, "float16", "two windows"),
]


class Memory:
    """The pools of an executor on the GPU, their host pools, and the reference's.

    What was never written decodes to NaN.
    """

    def __init__(self, executor: Executor, kv_format: KVFormat) -> None:
        self.pools: list[PagedPool] = []
        self.gpu: list[dict[str, torch.Tensor]] = []
        self._reference: list[dict[str, np.ndarray]] = []
        for layers in executor.layers:
            shapes = [
                kv_format.pool_shape(executor.num_blocks[where], len(layers), HEADS[1], executor.tokens_per_block)
                for where in (PRIMARY, SECONDARY)
            ]
            blank = [torch.full(shape, 0xFF, dtype=torch.uint8) for shape in shapes]
            pool = PagedPool(kv_format, executor.num_blocks[PRIMARY], len(layers), HEADS[1], executor.tokens_per_block)
            pool.data = blank[0].clone()
            self.pools.append(pool)
            self.gpu.append({PRIMARY: blank[0].cuda(), SECONDARY: blank[1].pin_memory()})
            self._reference.append({PRIMARY: pool.data.numpy(), SECONDARY: blank[1].clone().numpy()})
        self.pointers = np.array([[x[where].data_ptr() for where in (PRIMARY, SECONDARY)] for x in self.gpu], np.int64)

    def move(self, copy: Copy) -> None:
        copy.apply(self._reference[copy.pool])
        copy.apply(self.gpu[copy.pool])


@dataclass
class LayerStep:
    """A layer's part of a step, as :class:`plugin_layer.Layer` takes it."""

    kv_format: KVFormat
    tokens_per_block: int
    layer_idx: int
    qkv: torch.Tensor
    gpu: dict[str, torch.Tensor]
    host: dict[str, np.ndarray]
    heads: tuple[int, int] = HEADS
    softcap: float | None = None
    k_center: torch.Tensor | None = None
    frames: tuple[torch.Tensor, ...] = ()


class Run:
    """An engine of attention layers alone, in buffers that stay where they are, and its CUDA graphs."""

    def __init__(self, executor: Executor, kv_format: KVFormat, make_layer, rng: torch.Generator) -> None:
        self.executor, self.kv_format, self.rng = executor, kv_format, rng
        self.memory = Memory(executor, kv_format)
        head_dim, width = kv_format.head_dim, (HEADS[0] + 2 * HEADS[1]) * kv_format.head_dim
        angle = torch.rand(ALL, head_dim // 2, generator=rng) * 6.28
        self.cos_sin = torch.stack([angle.cos(), angle.sin()], dim=-1)
        most = executor.max_num_tokens
        self.qkv = [torch.zeros(most, width, dtype=DTYPES[kv_format.dtype]).cuda() for _ in executor.windows]
        ints = ("position_ids", "last_token_ids", "sequence_length")
        self.buffers = {name: torch.zeros(most, dtype=torch.int32).cuda() for name in ints}
        tables = len(executor.layers) * executor.max_batch_size * 2 * executor.max_blocks
        self.buffers["kv_cache_block_offsets"] = torch.zeros(tables, dtype=torch.int32).cuda()
        self.buffers["rotary_cos_sin"] = self.cos_sin.cuda()
        blank = np.zeros(executor.max_batch_size, np.int32)
        self.host = {
            "host_request_types": blank,
            "host_kv_cache_pool_pointers": self.memory.pointers,
            "host_kv_cache_pool_mapping": executor.mapping,
            "host_max_attention_window_sizes": np.array(executor.windows, np.int32),
        }
        self.layers, self.out = [], []
        for step in self._layer_steps(most, {name: x.shape for name, x in self.buffers.items()}):
            self.layers.append(make_layer(step))
            self.out.append(self.layers[-1].tensors(step))
        self.graphs: dict[tuple[int, int], torch.cuda.CUDAGraph] = {}

    def _layer_steps(self, num_tokens: int, shapes: dict[str, tuple[int, ...]]) -> list[LayerStep]:
        """Views of the buffers: each begins where its buffer does, whatever a step's shapes are."""
        gpu = {name: x.flatten()[: int(np.prod(shapes[name]))].view(shapes[name]) for name, x in self.buffers.items()}
        return [
            LayerStep(
                self.kv_format,
                self.executor.tokens_per_block,
                i,
                qkv[:num_tokens],
                gpu | {"qkv": qkv[:num_tokens]},
                self.host,
            )
            for i, qkv in enumerate(self.qkv)
        ]

    def step(self, step: ExecutorStep) -> list[dict[str, torch.Tensor]]:
        """Do a step; each layer's outputs."""
        for move in step.copies:
            self.memory.move(move)
        shapes = {"rotary_cos_sin": self.cos_sin.shape}
        for name in self.buffers.keys() - shapes.keys():
            shapes[name] = step.inputs[name].shape
            self.buffers[name][: step.inputs[name].size] = torch.from_numpy(step.inputs[name].reshape(-1)).cuda()
        self.host["host_request_types"] = step.inputs["host_request_types"]
        steps = self._layer_steps(step.num_tokens, shapes)
        for one, out in zip(steps, self.out, strict=True):
            one.qkv.copy_(torch.randn(one.qkv.shape, generator=self.rng))
            out["workspace"].random_(256)
            out["decode_counters"].fill_(77)
            for name in OUTPUTS:
                out[name].fill_(torch.nan)
        if step.graph_key in self.graphs:
            self.graphs[step.graph_key].replay()
        else:
            self._enqueue(steps)
        torch.cuda.synchronize()
        results = [{name: out[name][: step.num_tokens].cpu() for name in OUTPUTS} for out in self.out]
        if step.graph_key is not None and step.graph_key not in self.graphs:
            graph = self.graphs[step.graph_key] = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph):
                self._enqueue(steps)
        return results

    def _enqueue(self, steps: list[LayerStep]) -> None:
        for layer, one, out in zip(self.layers, steps, self.out, strict=True):
            used = {name: out[name][: len(one.qkv)] for name in OUTPUTS}
            used["decode_counters"] = out["decode_counters"][: len(one.gpu["sequence_length"])]
            layer.enqueue(one, used | {"workspace": out["workspace"]})
            assert layer.code == 0


def check_step(run: Run, step: ExecutorStep, results: list[dict[str, torch.Tensor]]) -> np.ndarray:
    """Outputs and pools are the reference's; its pools then go on as the GPU's are. What :func:`check_pool` counts."""
    executor, fmt, different = run.executor, run.kv_format, np.zeros(2)
    for p, (pool, layers) in enumerate(zip(run.memory.pools, executor.layers, strict=True)):
        plan = StepPlan.make(step.for_reference(p, len(layers)), pool)
        before, wanted = pool.data.clone(), {}
        for place, layer in enumerate(layers):
            rows = run.qkv[layer][: step.num_tokens].cpu().unflatten(1, (-1, fmt.head_dim))
            q, k, v = rows.split([HEADS[0], HEADS[1], HEADS[1]], dim=1)
            wanted[layer] = rotate_quantize_kv(q, k, v, run.cos_sin, pool, place, plan, rotate_v=fmt.rotate_v)
        different += check_pool(run.memory.gpu[p][PRIMARY].cpu(), pool.data, before, plan, fmt)
        pool.data.copy_(run.memory.gpu[p][PRIMARY])
        readable = copy.copy(pool)
        readable.data = pool.data.masked_fill((pool.data == 0xFF).all(-1, keepdim=True), 0)  # no NaN where nobody reads
        for place, layer in enumerate(layers):
            q, k, v = wanted[layer]
            context = paged_attention(q, k, v, readable, place, plan, window=executor.windows[layer])
            for name, want in {"q": q, "k": k, "v": v, "context": context}.items():
                assert_near(name, results[layer][name], want)
    return different


def check_pool(
    got: torch.Tensor, want: torch.Tensor, before: torch.Tensor, plan: StepPlan, fmt: KVFormat
) -> np.ndarray:
    """Rows are the reference's, but that a code on the border of two may be either, and a scale or lo be rounded to
    either side; rows that the step does not write are as they were. How many bytes differ, and are expected to."""
    different, expected = 0, 0.0
    for which in (K, V):
        found, due = (x[plan.write_blocks, :, which, :, plan.write_offsets] for x in (got, want))
        different += int((found != due).sum())
        expected += changed_bytes(due, fmt)
        x, y = decode_rows(found, fmt).double(), decode_rows(due, fmt).double()
        limit = rotated_rounding(fmt.hadamard_order, y.abs().amax(-1, keepdim=True))
        if fmt.quantized:
            tail = due[..., -ROW_TAIL_BYTES:].contiguous().view(torch.float16).double()
            ulp = spacing(tail, torch.float16)
            # A code more or less, under a scale and a lo that may each be the next one.
            limit = limit + tail[..., :1] + 15 * ulp[..., :1] + ulp[..., 1:]
        else:
            limit = limit + spacing(y, DTYPES[fmt.dtype])
        assert ((x - y).abs() <= limit).all()
    got, before = got.clone(), before.clone()
    got[plan.write_blocks, :, :, :, plan.write_offsets] = 0
    before[plan.write_blocks, :, :, :, plan.write_offsets] = 0
    assert torch.equal(got, before)
    return np.array([different, expected])


@pytest.mark.parametrize("seed", [0, 1])
@pytest.mark.parametrize(("kv", "head_dim", "dtype", "name"), CASES)
def test_a_run_is_the_references(kv, head_dim, dtype, name, seed, layer_of, plugin_driver, rng):
    if dtype == "bfloat16" and plugin_driver.TENSORRT[0] < 10:
        pytest.skip("TensorRT 8.6 has no bfloat16")
    run = Run(make_executor(name, seed), KVFormat(kv, head_dim, dtype=dtype), layer_of, rng)
    replayed, counts = 0, np.zeros(2)
    for _ in range(NUM_STEPS):
        step = run.executor.step()
        replayed += step.graph_key in run.graphs
        counts += check_step(run, step, run.step(step))
    assert replayed > 3
    different, expected = counts
    assert different <= most_changed_bytes(expected, run.kv_format)


def test_a_partial_copy_moves_whole_rows(rng):
    """``kvCacheBlockPartialCopy`` thread by thread: what :class:`Copy` does at once."""
    layers, heads, tokens, row_bytes, rows = 3, 2, 16, 36, 5
    shape = (4, layers, 2, heads, tokens, row_bytes)
    memory = torch.randint(256, shape, generator=rng, dtype=torch.uint8)
    want, flat = memory.clone(), memory.flatten()
    block = layers * 2 * heads * tokens * row_bytes
    for layer in range(layers * 2):
        for head in range(heads):
            for token in range(rows):
                for byte in range(row_bytes):
                    at = layer * heads * tokens * row_bytes + (head * tokens + token) * row_bytes + byte
                    want.view(-1)[2 * block + at] = flat[block + at]
    gpu = {PRIMARY: memory.cuda()}
    Copy(0, (PRIMARY, 1), (PRIMARY, 2), rows).apply(gpu)
    assert torch.equal(gpu[PRIMARY].cpu(), want)
