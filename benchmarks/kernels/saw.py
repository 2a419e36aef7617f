"""Our side: :mod:`saw_trtllm.ops` on a problem's tensors."""

from __future__ import annotations

import torch

from benchmarks.kernels.cases import WRITE_CHUNK, Case
from benchmarks.kernels.problem import BYTES, DTYPE, Problem
from benchmarks.kernels.run import Contender
from saw_trtllm import ops
from saw_trtllm.backends.reference.int4 import rotate
from saw_trtllm.format import KVFormat

#: Tokens of one launch when a pool is filled.
_FILL_TOKENS = 1 << 17


def kv_format(name: str, head_dim: int) -> KVFormat:
    """The format of a contender's pool."""
    kv = {"bf16": "fp16", "folded": "saw_int4", "framed": "saw_int4"}.get(name, name)
    return KVFormat(kv, head_dim, dtype="bfloat16", rotate_v=name == "saw_int4")


def _offsets(blocks: torch.Tensor) -> torch.Tensor:
    """TensorRT-LLM's block table of a pool of one layer: ``block · 2 + (0 K, 1 V)``."""
    return torch.stack([blocks * 2, blocks * 2 + 1], dim=1).int()


def _ints(*values: int) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.int32, device="cuda")


def _ends(count: int, tokens: int) -> torch.Tensor:
    """``last_token_ids`` of sequences with as many tokens each."""
    return torch.arange(1, count + 1, dtype=torch.int32, device="cuda") * tokens


def _empty_pool(fmt: KVFormat, num_blocks: int, case: Case) -> torch.Tensor:
    shape = fmt.pool_shape(num_blocks, 1, case.heads.num_kv_heads, case.tokens_per_block)
    return torch.zeros(shape, dtype=torch.uint8, device="cuda")


def _filled_pool(problem: Problem, fmt: KVFormat, offsets: torch.Tensor) -> torch.Tensor:
    """A pool of the problem's keys and values, written by rotate_quantize_kv with RoPE's angles at 0."""
    case, heads = problem.case, problem.case.heads
    pool = _empty_pool(fmt, problem.blocks.numel(), case)
    cos_sin = torch.tensor([1.0, 0.0], device="cuda").expand(1, heads.head_dim // 2, 2).contiguous()
    step = max(1, _FILL_TOKENS // case.context)
    for first in range(0, case.batch, step):
        k, v = (x[first : first + step].flatten(0, 1) for x in (problem.k, problem.v))
        count = min(step, case.batch - first)
        ops.rotate_quantize_kv(
            torch.cat([k, k, v], dim=1).flatten(1),  # K in Q's place: as many heads
            cos_sin,
            torch.zeros(len(k), dtype=torch.int32, device="cuda"),
            _ends(count, case.context),
            _ints(*[case.context] * count),
            pool,
            offsets[first : first + step].contiguous(),
            kv_format=fmt,
            layer=0,
            q_out=torch.empty_like(k),
            stream=torch.cuda.current_stream(),
        )
    return pool


def _turned(x: torch.Tensor, fmt: KVFormat, which: bool = True) -> torch.Tensor:
    """Rotated as ``rotate_quantize_kv`` leaves it, if ``which`` is; rotated twice, it is as before."""
    return rotate(x, fmt.hadamard_order).to(x.dtype) if which and fmt.hadamard_order > 1 else x


def decode(problem: Problem, name: str) -> Contender:
    """``decode_attention`` on a pool of the named format."""
    case, heads = problem.case, problem.case.heads
    fmt, offsets = kv_format(name, heads.head_dim), _offsets(problem.blocks)
    pool = _filled_pool(problem, fmt, offsets)
    lengths = _ints(*[case.context] * case.batch)
    q = _turned(problem.q, fmt)
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
        bytes=problem.rows * fmt.row_bytes + problem.io_bytes,
        cosine=lambda: problem.cosine(_turned(out, fmt, fmt.rotate_v)),
    )


def prefill(problem: Problem, name: str) -> Contender:
    """``prefill_attention`` of a chunk, its history in a pool of the named format."""
    case, heads = problem.case, problem.case.heads
    fmt, offsets = kv_format(name, heads.head_dim), _offsets(problem.blocks)
    pool = _filled_pool(problem, fmt, offsets)
    q, k = _turned(problem.q, fmt), _turned(problem.chunk(problem.k).contiguous(), fmt)
    v = _turned(problem.chunk(problem.v).contiguous(), fmt, fmt.rotate_v)
    out = torch.empty_like(q)
    ends, lengths = _ends(case.batch, case.chunk), _ints(*[case.context] * case.batch)

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
        bytes=problem.rows * fmt.row_bytes + problem.io_bytes + (k.numel() + v.numel()) * BYTES,
        flops=problem.flops,
        cosine=lambda: problem.cosine(_turned(out, fmt, fmt.rotate_v)),
    )


def write(case: Case, name: str) -> Contender:
    """``rotate_quantize_kv`` of a step; one of chunks gives K and V out, too, which their prefill attention takes."""
    heads = case.heads
    fmt = kv_format(name, heads.head_dim)
    blocks = case.batch * (case.context // case.tokens_per_block)
    offsets = _offsets(torch.randperm(blocks, device="cuda").view(case.batch, -1))
    qkv = torch.randn(
        case.tokens, (heads.num_heads + 2 * heads.num_kv_heads) * heads.head_dim, dtype=DTYPE, device="cuda"
    )
    angle = torch.rand(case.context, heads.head_dim // 2, device="cuda") * 6.28
    positions = torch.arange(case.history, case.context, dtype=torch.int32, device="cuda").repeat(case.batch)
    tensors = {
        "qkv": qkv,
        "cos_sin": torch.stack([angle.cos(), angle.sin()], dim=-1),
        "position_ids": positions,
        "last_token_ids": _ends(case.batch, case.chunk),
        "sequence_length": _ints(*[case.context] * case.batch),
        "pool": _empty_pool(fmt, blocks, case),
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
