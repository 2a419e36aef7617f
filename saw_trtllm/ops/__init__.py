"""The kernels as checked operations on device arrays: the same that the plugins enqueue.

Every argument is checked before a launch: dtype, shape, layout, alignment and device. What an address points to, such
as the rows of a pool, is not.
"""

from saw_trtllm.ops.paged_attention import MAX_GROUP, decode_attention, decode_workspace_bytes, prefill_attention
from saw_trtllm.ops.pool import ACTIVATION_DTYPES
from saw_trtllm.ops.rotate_quantize_kv import rotate_quantize_kv

__all__ = [
    "ACTIVATION_DTYPES",
    "MAX_GROUP",
    "decode_attention",
    "decode_workspace_bytes",
    "prefill_attention",
    "rotate_quantize_kv",
]
