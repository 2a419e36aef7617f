"""Frames of keys and queries: random ones, and back from the layout that the kernels take."""

from __future__ import annotations

import numpy as np


def random_frames(shape: tuple[int, ...], head_dim: int, seed: int = 11, condition: float = 30.0) -> list[np.ndarray]:
    """A frame of keys and its inverse for queries, float32 ``[*shape, head_dim, head_dim]``.

    They are two rotations around scales from ``condition ** -0.5`` to ``condition ** 0.5``.
    """
    normal = np.random.default_rng(seed).standard_normal((2, *shape, head_dim, head_dim))
    left, right = np.linalg.qr(normal)[0]
    k_frame = left * condition ** np.linspace(-0.5, 0.5, head_dim) @ right
    return [k_frame.astype(np.float32), np.linalg.inv(k_frame).swapaxes(-1, -2).astype(np.float32)]


def unpack_frame(packed: np.ndarray) -> np.ndarray:
    """What :func:`saw_trtllm.ops.pack_frame` was given, as its docstring says where each number is."""
    heads, _, dim, _ = packed.shape
    lanes = packed.astype(np.float64).reshape(heads, 2, dim // 16, dim // 16, 32, 8)
    whole = lanes[:, 0] + lanes[:, 1] / 2048
    warp, step, lane, number = np.indices(whole.shape[1:])
    g, t = lane // 4, lane % 4
    j, h, i = number // 4, number // 2 % 2, number % 2
    frame = np.zeros((heads, dim, dim))
    frame[:, 16 * step + 8 * h + 2 * t + i, 16 * warp + 4 * (g // 2) + 2 * j + g % 2] = whole
    return frame
