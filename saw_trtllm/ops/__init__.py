"""The kernels as checked operations on device arrays: the same that the plugins enqueue.

Every argument is checked before a launch: dtype, shape, layout, alignment and device. What an address points to, such
as the rows of a pool, is not.
"""

from saw_trtllm.ops.arrays import ACTIVATION_DTYPES
from saw_trtllm.ops.gemm import gemm
from saw_trtllm.ops.lookup import lookup
from saw_trtllm.ops.paged_attention import MAX_GROUP, decode_attention, decode_workspace_bytes, prefill_attention
from saw_trtllm.ops.quantized_gemm import (
    PackedShape,
    dequantize,
    pack_weight,
    quantize_rows,
    quantized_gemm,
    unpack_rows,
)
from saw_trtllm.ops.rms_norm import rms_norm
from saw_trtllm.ops.rotate_quantize_kv import pack_frame, rotate_quantize_kv
from saw_trtllm.ops.sample import sample
from saw_trtllm.ops.silu_mul import silu_mul

__all__ = [
    "ACTIVATION_DTYPES",
    "MAX_GROUP",
    "PackedShape",
    "decode_attention",
    "decode_workspace_bytes",
    "dequantize",
    "gemm",
    "lookup",
    "pack_frame",
    "pack_weight",
    "prefill_attention",
    "quantize_rows",
    "quantized_gemm",
    "rms_norm",
    "rotate_quantize_kv",
    "sample",
    "silu_mul",
    "unpack_rows",
]
