"""A packed weight as the kernels read it, unpacked from what plugins/include/saw/quantized_gemm/weights.cuh says."""

from __future__ import annotations

import ml_dtypes
import numpy as np


def unpack_weight(kind: str, values: np.ndarray, scales: np.ndarray, shape: tuple[int, int]) -> np.ndarray:
    """float32 ``[out, in]`` of what :func:`saw_trtllm.ops.pack_weight` gives."""
    blocks, chunks, groups, _ = scales.shape
    words = np.ascontiguousarray(scales, np.float32).view(np.uint32)
    if kind == "int4":
        # Lanes are g, t; a word's nibbles are i, h (rows + 8), pair (columns + 8).
        nibbles = values.astype(np.uint32)[..., None] >> np.arange(0, 32, 4, dtype=np.uint32) & 15
        parts = nibbles.reshape(blocks, chunks, 4, 2, 8, 4, 4, 2, 2, 2).astype(np.float32)
        parts = parts.transpose(0, 2, 8, 4, 1, 3, 6, 9, 5, 7)
        zeros, factors = (words & 31).astype(np.float32), (words & ~np.uint32(31)).view(np.float32)
    else:
        # 16 bytes of a lane are step, pair, h, i.
        numbers = np.ascontiguousarray(values.astype(np.int32)).view(ml_dtypes.float8_e4m3fn).astype(np.float32)
        parts = numbers.reshape(blocks, chunks, 4, 4, 8, 4, 2, 2, 2, 2).transpose(0, 2, 8, 4, 1, 3, 6, 7, 5, 9)
        zeros, factors = np.zeros(words.shape, np.float32), words.view(np.float32)

    def spread(x: np.ndarray) -> np.ndarray:
        x = x.reshape(blocks, chunks, groups, 4, 8, 2).transpose(0, 3, 5, 4, 1, 2).reshape(blocks * 64, -1)
        return np.repeat(x, 128 // groups, axis=1)

    weight = (parts.reshape(blocks * 64, chunks * 128) - spread(zeros)) * spread(factors)
    return weight[: shape[0], : shape[1]]
