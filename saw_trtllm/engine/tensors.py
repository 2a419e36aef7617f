"""Each tensor of an engine once: its name in TensorRT-LLM's words, its dtype, its shape, and where it lies.

:mod:`saw_trtllm.engine.step` packs what differs from step to step; a runtime adds what it knows of the pools.
"""

from __future__ import annotations

from typing import Literal, NamedTuple

#: Dimensions: those that differ from step to step, and those that an engine fixes.
NUM_TOKENS, NUM_SEQUENCES, MAX_BLOCKS = "num_tokens", "num_sequences", "max_blocks_per_seq"
NUM_POOLS, NUM_LAYERS, VOCAB_SIZE = "num_pools", "num_layers", "vocab_size"


class EngineTensor(NamedTuple):
    """A tensor: NumPy's dtype name, and a shape whose dimensions are numbers or the names above.

    Those on the host are bound to host memory. To TensorRT they are like the others; the plugins read them when they
    are enqueued.
    """

    name: str
    shape: tuple[int | str, ...]
    dtype: str = "int32"
    place: Literal["gpu", "host"] = "gpu"


INPUT_IDS = EngineTensor("input_ids", (NUM_TOKENS,))
POSITION_IDS = EngineTensor("position_ids", (NUM_TOKENS,))
#: Inclusive prefix sum of the tokens of each sequence.
LAST_TOKEN_IDS = EngineTensor("last_token_ids", (NUM_SEQUENCES,))
#: KV length with this step's tokens.
SEQUENCE_LENGTH = EngineTensor("sequence_length", (NUM_SEQUENCES,))
#: 0 prefill, 1 decode; prefills first.
REQUEST_TYPES = EngineTensor("host_request_types", (NUM_SEQUENCES,), place="host")
#: ``block · layers of the pool · 2 + (0 K, 1 V)``.
BLOCK_OFFSETS = EngineTensor("kv_cache_block_offsets", (NUM_POOLS, NUM_SEQUENCES, 2, MAX_BLOCKS))
#: Primary and secondary address of each pool; before TensorRT 10, which has no INT64, each as two INT32s.
POOL_POINTERS = EngineTensor("host_kv_cache_pool_pointers", (NUM_POOLS, 2), "int64", "host")
#: The pool of each layer, and its place there.
POOL_MAPPING = EngineTensor("host_kv_cache_pool_mapping", (NUM_LAYERS, 2), place="host")
#: The runtime's window of each layer; the smaller of this and the plugin's own holds.
WINDOW_SIZES = EngineTensor("host_max_attention_window_sizes", (NUM_LAYERS,), place="host")

INPUTS = (
    INPUT_IDS,
    POSITION_IDS,
    LAST_TOKEN_IDS,
    SEQUENCE_LENGTH,
    REQUEST_TYPES,
    BLOCK_OFFSETS,
    POOL_POINTERS,
    POOL_MAPPING,
    WINDOW_SIZES,
)

#: Of each sequence's last token, or of every token.
LOGITS = EngineTensor("logits", (NUM_SEQUENCES, VOCAB_SIZE), "float32")
