"""What a decode launches for its cache, in one CUDA graph: a write and a decode of each layer, one after the other."""

from __future__ import annotations

import torch

from benchmarks.kernels.cases import LAYERS
from benchmarks.kernels.paged_attention import filled_pool, turned
from benchmarks.kernels.pool import empty_pool, ends_of, ints, kv_format, offsets_of
from benchmarks.kernels.problem import Problem
from benchmarks.kernels.run import Contender
from saw_trtllm import ops


def layers(problem: Problem, name: str) -> Contender:
    """``rotate_quantize_kv`` of a token of each sequence and ``decode_attention``, on a pool of the named format.

    All layers have the problem's keys and values: the last one's output is that of a decode.
    """
    case, heads = problem.case, problem.case.heads
    fmt, blocks = kv_format(name, heads.head_dim), problem.blocks
    pool, offsets = empty_pool(fmt, blocks.numel(), case, LAYERS), offsets_of(blocks, LAYERS)
    filled = filled_pool(problem, fmt, offsets_of(blocks))
    pool.copy_(filled.expand_as(pool))
    lengths, ends = ints(*[case.context] * case.batch), ends_of(case.batch, 1)
    k, v = problem.chunk(problem.k), problem.chunk(problem.v)
    qkv = torch.cat([problem.q, k, v], dim=1).flatten(1)
    # RoPE's angles are 0, as those of the filled pool.
    cos_sin = torch.tensor([1.0, 0.0], device="cuda").expand(1, heads.head_dim // 2, 2).contiguous()
    positions = torch.zeros(case.batch, dtype=torch.int32, device="cuda")
    q, out = torch.empty_like(problem.q), torch.empty_like(problem.q)
    size = ops.decode_workspace_bytes(case.batch, heads.num_heads, heads.num_kv_heads, heads.head_dim)
    workspace = torch.zeros(size, dtype=torch.uint8, device="cuda")

    def launch() -> None:
        stream = torch.cuda.current_stream()
        for layer in range(LAYERS):
            at = {"kv_format": fmt, "layer": layer, "stream": stream}
            ops.rotate_quantize_kv(qkv, cos_sin, positions, ends, lengths, pool, offsets, q_out=q, **at)
            ops.decode_attention(q, lengths, pool, offsets, out=out, workspace=workspace, **at)

    return Contender(
        name,
        {"": lambda: launch},
        bytes=problem.rows * fmt.row_bytes + problem.io_bytes + 2 * qkv.numel(),
        cosine=lambda: problem.cosine(turned(out, fmt, fmt.rotate_v)),
        layers=LAYERS,
    )
