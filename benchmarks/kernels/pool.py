"""The pool and the block table of a case, as :mod:`saw_trtllm.ops` takes them."""

from __future__ import annotations

import torch

from benchmarks.kernels.cases import Case
from saw_trtllm.format import KVFormat


def kv_format(name: str, head_dim: int) -> KVFormat:
    """The format of a contender's pool."""
    kv = {"bf16": "fp16", "folded": "saw_int4", "framed": "saw_int4"}.get(name, name)
    return KVFormat(kv, head_dim, dtype="bfloat16", rotate_v=name == "saw_int4")


def offsets_of(blocks: torch.Tensor, num_layers: int = 1) -> torch.Tensor:
    """TensorRT-LLM's block table of a pool: ``block · num_layers · 2 + (0 K, 1 V)``."""
    first = blocks * num_layers * 2
    return torch.stack([first, first + 1], dim=1).int()


def ints(*values: int) -> torch.Tensor:
    """An int32 tensor on the GPU."""
    return torch.tensor(values, dtype=torch.int32, device="cuda")


def ends_of(count: int, tokens: int) -> torch.Tensor:
    """``last_token_ids`` of sequences with as many tokens each."""
    return torch.arange(1, count + 1, dtype=torch.int32, device="cuda") * tokens


def empty_pool(fmt: KVFormat, num_blocks: int, case: Case, num_layers: int = 1) -> torch.Tensor:
    """A pool of zeros."""
    shape = fmt.pool_shape(num_blocks, num_layers, case.heads.num_kv_heads, case.tokens_per_block)
    return torch.zeros(shape, dtype=torch.uint8, device="cuda")
