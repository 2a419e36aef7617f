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
    build, size = config.build_config, config.block_bytes
    fitting = int(fraction * free) // size
    if max_tokens is not None:
        num_blocks = config.blocks_of_tokens(max_tokens)
        if num_blocks == 0:
            raise EngineError(
                f"the KV cache would hold {max_tokens} tokens and a block has {build.tokens_per_block}: give it more "
                "tokens"
            )
        if num_blocks > fitting:
            raise EngineError(
                f"a KV cache of {max_tokens} tokens takes {gib(num_blocks * size)} and may have "
                f"{gib(int(fraction * free))}, {fraction:.0%} of what the GPU has free beside the engine: give it at "
                f"most {config.tokens_of_blocks(fitting)} tokens, or raise {_FLAG}"
            )
        return num_blocks
    longest = config.blocks_for(build.max_seq_len, build.prefill_chunk)
    if fitting < longest:
        raise EngineError(
            f"the KV cache gets {gib(int(fraction * free))}, {fraction:.0%} of the {gib(free)} that the GPU has free "
            f"beside the engine, and one sequence of max_seq_len {build.max_seq_len} takes "
            f"{gib(longest * size)}: raise {_FLAG}, free memory there, or build the "
            "engine with a smaller --max_seq_len"
        )
    return min(fitting, build.max_batch_size * longest)
