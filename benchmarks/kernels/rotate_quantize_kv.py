"""The write of a step: :func:`saw_trtllm.ops.rotate_quantize_kv` on a case's tensors."""

from __future__ import annotations

import torch

from benchmarks.kernels.cases import WRITE_CHUNK, Case
from benchmarks.kernels.pool import empty_pool, ends_of, ints, kv_format, offsets_of
from benchmarks.kernels.problem import DTYPE
from benchmarks.kernels.run import Contender
from saw_trtllm import ops


def write(case: Case, name: str) -> Contender:
    """``rotate_quantize_kv`` of a step; one of chunks gives K and V out, too, which their prefill attention takes."""
    heads = case.heads
    fmt = kv_format(name, heads.head_dim)
    blocks = case.batch * (case.context // case.tokens_per_block)
    offsets = offsets_of(torch.randperm(blocks, device="cuda").view(case.batch, -1))
    qkv = torch.randn(
        case.tokens, (heads.num_heads + 2 * heads.num_kv_heads) * heads.head_dim, dtype=DTYPE, device="cuda"
    )
    angle = torch.rand(case.context, heads.head_dim // 2, device="cuda") * 6.28
    positions = torch.arange(case.history, case.context, dtype=torch.int32, device="cuda").repeat(case.batch)
    tensors = {
        "qkv": qkv,
        "cos_sin": torch.stack([angle.cos(), angle.sin()], dim=-1),
        "position_ids": positions,
        "last_token_ids": ends_of(case.batch, case.chunk),
        "sequence_length": ints(*[case.context] * case.batch),
        "pool": empty_pool(fmt, blocks, case),
        "block_offsets": offsets,
        "q_out": torch.empty(case.tokens, heads.num_heads, heads.head_dim, dtype=DTYPE, device="cuda"),
    }
    if name == "framed":
        for frame in ("k_frame", "q_frame"):
            values = torch.randn(heads.num_kv_heads, heads.head_dim, heads.head_dim) * heads.head_dim**-0.5
            tensors[frame] = torch.from_numpy(ops.pack_frame(values.numpy())).cuda()
    if case.chunk == WRITE_CHUNK:
        for out in ("k_out", "v_out"):
            tensors[out] = torch.empty(case.tokens, heads.num_kv_heads, heads.head_dim, dtype=DTYPE, device="cuda")

    def launch() -> None:
        ops.rotate_quantize_kv(**tensors, kv_format=fmt, layer=0, stream=torch.cuda.current_stream())

    moved = [tensors[x] for x in ("qkv", "position_ids", "q_out", "k_out", "v_out") if x in tensors]
    return Contender(
        name,
        {"": lambda: launch},
        bytes=sum(x.numel() * x.element_size() for x in moved)
        + case.chunk * heads.head_dim * 4  # the positions' angles, which the sequences share
        + 2 * case.tokens * heads.num_kv_heads * fmt.row_bytes,
    )
