"""What the GPU's memory is given to, decided once when an engine is opened."""

from __future__ import annotations

from dataclasses import dataclass

from saw_trtllm.backends.tensorrt.engine_checks import gib
from saw_trtllm.engine.config import EngineConfig
from saw_trtllm.errors import EngineError

_FLAG = "--kv_cache_free_gpu_memory_fraction"


@dataclass(frozen=True)
class MemoryPlan:
    """Bytes of the GPU's memory, and the blocks that they make.

    Attributes
    ----------
    total : int
        The GPU's.
    weights : int
        What reading the engine took: weights, and TensorRT's own.
    activations : int
        One block of memory for the intermediate tensors and workspaces of a step.
    io : int
        A step's inputs and logits, and the sampler's state.
    pool : int
        The KV cache's rows.
    free : int
        What is left: CUDA's, for graphs and kernels that are loaded later.
    num_blocks : int
    """

    total: int
    weights: int
    activations: int
    io: int
    pool: int
    free: int
    num_blocks: int


def plan_blocks(config: EngineConfig, free: int, max_tokens: int | None, fraction: float) -> int:
    """How many blocks the KV cache has.

    Parameters
    ----------
    config : EngineConfig
    free : int
        Bytes that are left when all else is allocated.
    max_tokens : int, optional
        Tokens asked for. By default as many as fit, and at most what ``max_batch_size`` sequences of ``max_seq_len``
        need.
    fraction : float
        Share of ``free`` that the pool may take.

    Raises
    ------
    EngineError
        If the tokens asked for do not fit; or if those that fit are less than one sequence of ``max_seq_len``.
    """
    build, per_token = config.build_config, config.bytes_per_token
    fitting = int(fraction * free) // (per_token * build.tokens_per_block)
    if max_tokens is not None:
        num_blocks = max_tokens // build.tokens_per_block
        if num_blocks == 0:
            raise EngineError(
                f"the KV cache would hold {max_tokens} tokens and a block has {build.tokens_per_block}: give it more "
                "tokens"
            )
        if num_blocks > fitting:
            raise EngineError(
                f"a KV cache of {max_tokens} tokens takes {gib(max_tokens * per_token)} and may have "
                f"{gib(int(fraction * free))}, {fraction:.0%} of what the GPU has free beside the engine: give it at "
                f"most {fitting * build.tokens_per_block} tokens, or raise {_FLAG}"
            )
        return num_blocks
    longest = -(-build.max_seq_len // build.tokens_per_block)
    if fitting < longest:
        raise EngineError(
            f"the KV cache gets {gib(int(fraction * free))}, {fraction:.0%} of the {gib(free)} that the GPU has free "
            f"beside the engine, and one sequence of max_seq_len {build.max_seq_len} takes "
            f"{gib(longest * build.tokens_per_block * per_token)}: raise {_FLAG}, free memory there, or build the "
            "engine with a smaller --max_seq_len"
        )
    return min(fitting, build.max_batch_size * longest)
