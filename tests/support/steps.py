"""A step of prefills and decodes, for the kernels and for what wraps them, and what the CPU reference makes of it."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
import torch

from saw_trtllm import ops
from saw_trtllm.backends.reference.cache import PagedPool, StepPlan
from saw_trtllm.backends.reference.paged_attention import paged_attention
from saw_trtllm.backends.reference.rotate_quantize_kv import rotate_quantize_kv
from saw_trtllm.engine.step import DECODE, PREFILL, StepInputs
from saw_trtllm.format import KVFormat
from tests.support.frames import random_frames
from tests.support.paged import LAYER, NUM_LAYERS, Table, poisoned_pool
from tests.support.tolerance import changed_bytes, most_changed_bytes

DTYPES = {"float16": torch.float16, "bfloat16": torch.bfloat16}
NUM_POSITIONS = 1024
#: Tokens of history and of this step.
PREFILLS = [(0, 37), (60, 65), (5, 1), (300, 130)]
DECODES = [(1, 1), (16, 1), (500, 1), (63, 1), (64, 1)]
#: The step's pool is the second of two, and its layer the second of that pool.
LAYER_IDX, POOL, NUM_POOLS = 3, 1, 2
MAPPING = np.array([[0, 0], [1, 0], [0, 1], [POOL, LAYER], [1, 2]], np.int32)
#: Formats, and what else a step may have.
CASES = [
    ("saw_int4", 64, "float16", {}),
    ("saw_int4", 96, "float16", {"center": True}),
    ("saw_int4", 128, "float16", {"window": 40}),
    ("saw_int4", 128, "bfloat16", {"heads": (32, 2)}),
    ("saw_int4", 256, "float16", {"softcap": 20.0}),
    ("saw_int4", 64, "float16", {"frames": True, "center": True}),
    ("saw_int4", 128, "bfloat16", {"frames": True}),
    ("int4", 128, "float16", {"tokens_per_block": 64}),
    ("fp16", 128, "float16", {}),
    ("fp16", 64, "bfloat16", {}),
]


@dataclass
class Step:
    """A step's tensors: on the CPU as the reference takes them, on the GPU or the host as an engine's."""

    kv_format: KVFormat
    sequences: list[tuple[int, int]]
    num_prefills: int
    heads: tuple[int, int]
    tokens_per_block: int
    table: Table
    qkv: torch.Tensor
    cos_sin: torch.Tensor
    pool: torch.Tensor
    k_center: torch.Tensor | None
    #: Of keys and of queries, float32 ``[num_kv_heads, head_dim, head_dim]``.
    frames: list[torch.Tensor]
    window: int | None
    softcap: float | None
    padding: int = 0
    layer_idx: int = LAYER_IDX
    gpu: dict[str, torch.Tensor] = field(default_factory=dict)
    host: dict[str, np.ndarray] = field(default_factory=dict)

    @classmethod
    def make(
        cls,
        kv_format,
        rng,
        *,
        prefills=tuple(PREFILLS),
        decodes=tuple(DECODES),
        heads=(8, 2),
        tokens_per_block=32,
        center=False,
        frames=False,
        window=None,
        softcap=None,
        padding=0,
    ) -> Step:
        sequences = [*prefills, *decodes]
        num_tokens, head_dim = sum(n for _, n in sequences), kv_format.head_dim
        table = Table.make([h + n for h, n in sequences], tokens_per_block, rng)
        histories = [h for h, _ in sequences]
        angle = torch.rand(NUM_POSITIONS, head_dim // 2, generator=rng) * 6.28
        width = heads[0] + 2 * heads[1]
        step = cls(
            kv_format=kv_format,
            sequences=sequences,
            num_prefills=len(prefills),
            heads=heads,
            tokens_per_block=tokens_per_block,
            table=table,
            qkv=torch.randn(num_tokens, width * head_dim, generator=rng).to(DTYPES[kv_format.dtype]),
            cos_sin=torch.stack([angle.cos(), angle.sin()], dim=-1),
            pool=poisoned_pool(kv_format, table, histories, heads[1], tokens_per_block, rng),
            k_center=torch.randn(heads[1], head_dim, generator=rng) if center else None,
            frames=[torch.from_numpy(x) for x in random_frames((heads[1],), head_dim)] if frames else [],
            window=window,
            softcap=softcap,
            padding=padding,
        )
        step._place()
        return step

    @property
    def num_tokens(self) -> int:
        return sum(n for _, n in self.sequences)

    def _place(self) -> None:
        counts = torch.tensor([n for _, n in self.sequences])
        lengths = torch.tensor([h + n for h, n in self.sequences], dtype=torch.int32)
        ends, pad = counts.cumsum(0).int(), self.padding
        positions = torch.cat([torch.arange(h, h + n) for h, n in self.sequences]).int()
        offsets = torch.full((NUM_POOLS, *self.table.offsets.shape), -1, dtype=torch.int32)
        offsets[POOL] = self.table.offsets
        qkv = torch.cat([self.qkv, torch.full((pad, self.qkv.shape[1]), torch.nan).to(self.qkv.dtype)])
        self.gpu = {
            "qkv": qkv,
            "position_ids": torch.cat([positions, positions.new_zeros(pad)]),
            "last_token_ids": torch.cat([ends, ends[-1:].expand(pad)]),
            "sequence_length": torch.cat([lengths, lengths.new_zeros(pad)]),
            "kv_cache_block_offsets": torch.cat(
                [offsets, offsets.new_full((NUM_POOLS, pad, *offsets.shape[2:]), -1)], 1
            ),
            "rotary_cos_sin": self.cos_sin,
            "pool": self.pool,
        }
        if self.k_center is not None:
            self.gpu["k_center"] = self.k_center
        for name, frame in zip(("k_frame", "q_frame"), self.frames, strict=False):
            self.gpu[name] = torch.from_numpy(ops.pack_frame(frame.numpy()))
        self.gpu = {name: x.cuda().contiguous() for name, x in self.gpu.items()}
        decodes = len(self.sequences) - self.num_prefills + pad
        pointers = np.zeros((NUM_POOLS, 2), np.int64)
        pointers[0] = 0xDEAD0000  # another pool: nobody may read there
        pointers[POOL, 0] = self.gpu["pool"].data_ptr()
        self.host = {
            "host_request_types": np.array([PREFILL] * self.num_prefills + [DECODE] * decodes, np.int32),
            "host_kv_cache_pool_pointers": pointers,
            "host_kv_cache_pool_mapping": MAPPING.copy(),
            "host_max_attention_window_sizes": np.full(len(MAPPING), self.window or 0, np.int32),
        }

    def reference(self) -> dict[str, torch.Tensor]:
        counts = np.array([n for _, n in self.sequences], np.int32)
        inputs = StepInputs(
            input_ids=np.zeros(self.num_tokens, np.int32),
            position_ids=np.concatenate([np.arange(h, h + n, dtype=np.int32) for h, n in self.sequences]),
            last_token_ids=np.cumsum(counts, dtype=np.int32),
            sequence_length=np.array([h + n for h, n in self.sequences], np.int32),
            context_lengths=counts,
            host_request_types=self.host["host_request_types"][: len(counts)],
            kv_cache_block_offsets=self.table.offsets[None].numpy(),
        )
        pool = PagedPool(self.kv_format, 1, NUM_LAYERS, self.heads[1], self.tokens_per_block)
        pool.data = self.pool.clone()
        plan = StepPlan.make(inputs, pool)
        rows = self.qkv.unflatten(1, (-1, self.kv_format.head_dim))
        q, k, v = rows.split([self.heads[0], self.heads[1], self.heads[1]], dim=1)
        levers = dict(zip(("k_frame", "q_frame"), self.frames, strict=False)) | {"k_center": self.k_center}
        rotate_v = self.kv_format.rotate_v
        q, k, v = rotate_quantize_kv(q, k, v, self.cos_sin, pool, LAYER, plan, rotate_v=rotate_v, **levers)
        context = paged_attention(q, k, v, pool, LAYER, plan, window=self.window, softcap=self.softcap)
        return {"q": q, "k": k, "v": v, "context": context, "pool": pool.data}


def assert_matches(step: Step, got: dict[str, torch.Tensor], want: dict[str, torch.Tensor]) -> None:
    for name in ("q", "k", "v", "context"):
        assert_near(name, got[name][: step.num_tokens].cpu(), want[name])
    different, written = got["pool"].cpu() != want["pool"], (want["pool"] != step.pool).any(-1)
    expected = changed_bytes(want["pool"][written], step.kv_format)
    assert different.sum() <= most_changed_bytes(expected, step.kv_format)


def assert_near(name: str, got: torch.Tensor, want: torch.Tensor) -> None:
    """An output of the plugins is the reference's, but for the rounding of its dtype."""
    x, y, eps = got.double(), want.double(), torch.finfo(got.dtype).eps
    assert x.isfinite().all(), name
    # A code on the border of two moves a value by a scale; the attention rounds P and its sums to 16 bits.
    limit = (8 if name == "context" else 1.01) * eps
    norm = y.square().mean(-1, keepdim=True).sqrt()
    assert ((x - y).abs() <= limit * torch.maximum(y.abs(), 2 * norm) + 1e-6).all(), name


def run_kernels(step: Step) -> dict[str, torch.Tensor]:
    """The step through the kernels, called one by one: prefills to one, decodes to the other.

    Returns
    -------
    dict of torch.Tensor
        q, k and v rotated, context, and the pool.
    """
    (heads, kv_heads), head_dim = step.heads, step.kv_format.head_dim
    tokens, n = len(step.gpu["qkv"]), step.num_prefills
    ends, lengths, pool = step.gpu["last_token_ids"], step.gpu["sequence_length"], step.gpu["pool"].clone()
    table = step.gpu["kv_cache_block_offsets"][POOL].contiguous()
    q, k, v = (
        torch.full((tokens, x, head_dim), torch.nan, dtype=step.qkv.dtype, device="cuda")
        for x in (heads, kv_heads, kv_heads)
    )
    context = torch.full_like(q, torch.nan)
    shared = {"kv_format": step.kv_format, "layer": LAYER, "stream": torch.cuda.current_stream()}
    ops.rotate_quantize_kv(
        step.gpu["qkv"],
        step.gpu["rotary_cos_sin"],
        step.gpu["position_ids"],
        ends,
        lengths,
        pool,
        table,
        q_out=q,
        k_out=k,
        v_out=v,
        **{name: step.gpu.get(name) for name in ("k_center", "k_frame", "q_frame")},
        **shared,
    )
    shared |= {"window": step.window, "softcap": step.softcap}
    first = int(ends[n - 1]) if n else 0
    if n:
        ops.prefill_attention(
            *(x[:first] for x in (q, k, v)), ends[:n], lengths[:n], pool, table[:n], out=context[:first], **shared
        )
    if n < len(step.sequences):
        last = len(step.sequences)
        size = ops.decode_workspace_bytes(last - n, heads, kv_heads, head_dim)
        ops.decode_attention(
            q[first : step.num_tokens],
            lengths[n:last].clone(),  # a copy begins at an aligned address
            pool,
            table[n:last].contiguous(),
            out=context[first : step.num_tokens],
            workspace=torch.zeros(size, dtype=torch.uint8, device="cuda"),
            **shared,
        )
    torch.cuda.synchronize()
    return {"q": q, "k": k, "v": v, "context": context, "pool": pool}
