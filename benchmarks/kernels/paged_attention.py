"""Decode and prefill attention: those of :mod:`saw_trtllm.ops` on a problem's tensors."""

from __future__ import annotations

import torch

from benchmarks.kernels.pool import empty_pool, ends_of, ints, kv_format, offsets_of
from benchmarks.kernels.problem import BYTES, Problem
from benchmarks.kernels.run import Contender
from saw_trtllm import ops
from saw_trtllm.backends.reference.int4 import rotate
from saw_trtllm.format import KVFormat

#: Tokens of one launch when a pool is filled.
_FILL_TOKENS = 1 << 17


def filled_pool(problem: Problem, fmt: KVFormat, offsets: torch.Tensor) -> torch.Tensor:
    """A pool of the problem's keys and values, written by rotate_quantize_kv with RoPE's angles at 0."""
    case, heads = problem.case, problem.case.heads
    pool = empty_pool(fmt, problem.blocks.numel(), case)
    cos_sin = torch.tensor([1.0, 0.0], device="cuda").expand(1, heads.head_dim // 2, 2).contiguous()
    step = max(1, _FILL_TOKENS // case.context)
    for first in range(0, case.batch, step):
        k, v = (x[first : first + step].flatten(0, 1) for x in (problem.k, problem.v))
        count = min(step, case.batch - first)
        ops.rotate_quantize_kv(
            torch.cat([k, k, v], dim=1).flatten(1),  # K in Q's place: as many heads
            cos_sin,
            torch.zeros(len(k), dtype=torch.int32, device="cuda"),
            ends_of(count, case.context),
            ints(*[case.context] * count),
            pool,
            offsets[first : first + step].contiguous(),
            kv_format=fmt,
            layer=0,
            q_out=torch.empty_like(k),
            stream=torch.cuda.current_stream(),
        )
    return pool


def turned(x: torch.Tensor, fmt: KVFormat, which: bool = True) -> torch.Tensor:
    """Rotated as ``rotate_quantize_kv`` leaves it, if ``which`` is; rotated twice, it is as before."""
    return rotate(x, fmt.hadamard_order).to(x.dtype) if which and fmt.hadamard_order > 1 else x


def decode(problem: Problem, name: str) -> Contender:
    """``decode_attention`` on a pool of the named format."""
    case, heads = problem.case, problem.case.heads
    fmt, offsets = kv_format(name, heads.head_dim), offsets_of(problem.blocks)
    pool = filled_pool(problem, fmt, offsets)
    lengths = ints(*[case.context] * case.batch)
    q = turned(problem.q, fmt)
    out = torch.empty_like(q)
    size = ops.decode_workspace_bytes(case.batch, heads.num_heads, heads.num_kv_heads, heads.head_dim)
    workspace = torch.zeros(size, dtype=torch.uint8, device="cuda")

    def launch() -> None:
        ops.decode_attention(
            q,
            lengths,
            pool,
            offsets,
            kv_format=fmt,
            layer=0,
            out=out,
            workspace=workspace,
            stream=torch.cuda.current_stream(),
        )

    return Contender(
        name,
        {"": lambda: launch},
        bytes=problem.rows // 2 * fmt.pair_bytes + problem.io_bytes,
        cosine=lambda: problem.cosine(turned(out, fmt, fmt.rotate_v)),
    )


def prefill(problem: Problem, name: str) -> Contender:
    """``prefill_attention`` of a chunk, its history in a pool of the named format."""
    case, heads = problem.case, problem.case.heads
    fmt, offsets = kv_format(name, heads.head_dim), offsets_of(problem.blocks)
    pool = filled_pool(problem, fmt, offsets)
    q, k = turned(problem.q, fmt), turned(problem.chunk(problem.k).contiguous(), fmt)
    v = turned(problem.chunk(problem.v).contiguous(), fmt, fmt.rotate_v)
    out = torch.empty_like(q)
    ends, lengths = ends_of(case.batch, case.chunk), ints(*[case.context] * case.batch)

    def launch() -> None:
        ops.prefill_attention(
            q,
            k,
            v,
            ends,
            lengths,
            pool,
            offsets,
            kv_format=fmt,
            layer=0,
            out=out,
            stream=torch.cuda.current_stream(),
        )

    return Contender(
        name,
        {"": lambda: launch},
        bytes=problem.rows // 2 * fmt.pair_bytes + problem.io_bytes + (k.numel() + v.numel()) * BYTES,
        flops=problem.flops,
        cosine=lambda: problem.cosine(turned(out, fmt, fmt.rotate_v)),
    )
