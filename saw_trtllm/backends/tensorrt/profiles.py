"""The engine's tensors, in TensorRT-LLM's names and shapes, and the ranges that optimization profiles give them."""

from __future__ import annotations

from typing import NamedTuple

from saw_trtllm.backends.tensorrt.versions import TensorRT
from saw_trtllm.engine.config import BuildConfig, EngineConfig

#: Dimensions that differ from step to step.
NUM_TOKENS, NUM_SEQUENCES, MAX_BLOCKS = "num_tokens", "num_sequences", "max_blocks_per_seq"

LOGITS = "logits"

#: Rows from which on a GEMM on current GPUs is bound by arithmetic, and below which by its weights, about: what the
#: kernels of a decode are best chosen for.
_DECODE_TOKENS = 128
#: A prefill's: large enough for any GEMM to fill the GPU.
_PREFILL_TOKENS = 2048


class Input(NamedTuple):
    """An input: NumPy's dtype name, and a shape whose dynamic dimensions are names.

    Those called ``host_*`` are bound to host memory. To TensorRT they are like the others; the plugins read them when
    they are enqueued.
    """

    name: str
    dtype: str
    shape: tuple[int | str, ...]


class Range(NamedTuple):
    """A dynamic dimension's in a profile; the kernels are chosen for ``best``."""

    least: int
    best: int
    most: int


def step_inputs(config: EngineConfig, tensorrt: TensorRT) -> list[Input]:
    """What the engine is fed in a step; :mod:`saw_trtllm.engine.step` says what is in them."""
    layers, pools = config.pretrained_config.num_hidden_layers, len(config.pools)
    pointers_dtype, pointers_shape = tensorrt.pool_pointers(pools)
    return [
        Input("input_ids", "int32", (NUM_TOKENS,)),
        Input("position_ids", "int32", (NUM_TOKENS,)),
        Input("last_token_ids", "int32", (NUM_SEQUENCES,)),
        Input("sequence_length", "int32", (NUM_SEQUENCES,)),
        Input("host_request_types", "int32", (NUM_SEQUENCES,)),
        Input("kv_cache_block_offsets", "int32", (pools, NUM_SEQUENCES, 2, MAX_BLOCKS)),
        Input("host_kv_cache_pool_pointers", pointers_dtype, pointers_shape),
        Input("host_kv_cache_pool_mapping", "int32", (layers, 2)),
        Input("host_max_attention_window_sizes", "int32", (layers,)),
    ]


def profiles(limits: BuildConfig, decode_profile: bool) -> list[dict[str, Range]]:
    """The ranges of the dynamic dimensions.

    Parameters
    ----------
    limits : BuildConfig
    decode_profile : bool
        Whether steps of decodes alone have a profile of their own, with kernels chosen for few rows.

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


def shapes(tensor: Input, profile: dict[str, Range]) -> tuple[tuple[int, ...], ...]:
    """Least, best and most shape of an input in a profile."""
    return tuple(tuple(profile[d][i] if isinstance(d, str) else d for d in tensor.shape) for i in range(3))
