"""The engine's inputs to TensorRT, and the ranges that optimization profiles give their shapes."""

from __future__ import annotations

from typing import NamedTuple

from saw_trtllm.backends.tensorrt.versions import TensorRT
from saw_trtllm.engine.config import EngineConfig
from saw_trtllm.engine.limits import BuildConfig
from saw_trtllm.engine.tensors import (
    INPUTS,
    MAX_BLOCKS,
    NUM_LAYERS,
    NUM_POOLS,
    NUM_SEQUENCES,
    NUM_TOKENS,
    POOL_POINTERS,
    EngineTensor,
)

#: Rows from which on a GEMM on current GPUs is bound by arithmetic, and below which by its weights, about: what the
#: kernels of a decode are best chosen for.
_DECODE_TOKENS = 128
#: A prefill's: large enough for any GEMM to fill the GPU.
_PREFILL_TOKENS = 2048


class Range(NamedTuple):
    """A dynamic dimension's in a profile; the kernels are chosen for ``best``."""

    least: int
    best: int
    most: int


def step_inputs(config: EngineConfig, tensorrt: TensorRT) -> list[EngineTensor]:
    """The engine's inputs, with what it fixes of their shapes as numbers."""
    pools = len(config.pools)
    fixed = {NUM_POOLS: pools, NUM_LAYERS: config.pretrained_config.num_hidden_layers}
    inputs = [
        tensor._replace(shape=tuple(fixed.get(d, d) if isinstance(d, str) else d for d in tensor.shape))
        for tensor in INPUTS
    ]
    dtype, shape = tensorrt.pool_pointers(pools)
    return [x._replace(dtype=dtype, shape=shape) if x.name == POOL_POINTERS.name else x for x in inputs]


def profiles(limits: BuildConfig, decode_profile: bool) -> list[dict[str, Range]]:
    """The ranges of the dynamic dimensions.

    Parameters
    ----------
    limits : BuildConfig
    decode_profile : bool
        Whether steps that hold only decodes have a profile of their own, with kernels chosen for few rows.

    Returns
    -------
    list of dict
        Profile 0 takes any step; profile 1, if there is one, those with a token for each sequence.
    """
    B, T = limits.max_batch_size, limits.max_num_tokens
    blocks = -(-limits.max_seq_len // limits.tokens_per_block)
    few = min(B, _DECODE_TOKENS)
    common = {NUM_SEQUENCES: Range(1, few, B), MAX_BLOCKS: Range(1, blocks, blocks)}
    found = [common | {NUM_TOKENS: Range(1, min(T, _PREFILL_TOKENS), T)}]
    if decode_profile:
        found.append(common | {NUM_TOKENS: common[NUM_SEQUENCES]})
    return found


def shapes(tensor: EngineTensor, profile: dict[str, Range]) -> tuple[tuple[int, ...], ...]:
    """Least, best and most shape of an input in a profile."""
    return tuple(tuple(profile[d][i] if isinstance(d, str) else d for d in tensor.shape) for i in range(3))
