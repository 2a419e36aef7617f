"""The two operations of the plugins, in plain PyTorch: write the step's rows, attend to the pool.

Everything is computed in fp32 and rounded to the activations' dtype where a plugin's output tensor is.
Each query's result is independent of what else is in the step, down to the last bit: products over fewer than 4 rows
take another path in the CPU's GEMM, and sums another order, so rows and keys are padded to fixed multiples.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F

from saw_trtllm.reference.cache import K, PagedPool, StepPlan, V
from saw_trtllm.reference.int4 import rotate

ROW_MULTIPLE = 8
_KEY_MULTIPLE = 64
#: Queries of a prefill that are attended at a time, so that scores do not grow with chunk x context.
_QUERY_TILE = 512


def apply_rope(x: torch.Tensor, cos_sin: torch.Tensor) -> torch.Tensor:
    """Rotate NeoX half-split pairs (i, i + head_dim/2).

    Parameters
    ----------
    x : torch.Tensor
        ``[n, heads, head_dim]``.
    cos_sin : torch.Tensor
        fp32 ``[n, head_dim / 2, 2]``.
    """
    cos, sin = cos_sin[:, None, :, 0], cos_sin[:, None, :, 1]
    a, b = x.float().chunk(2, dim=-1)
    return torch.cat([a * cos - b * sin, b * cos + a * sin], dim=-1)


def rotate_quantize_kv(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    cos_sin: torch.Tensor,
    pool: PagedPool,
    layer: int,
    plan: StepPlan,
    *,
    rotate_v: bool = False,
    k_center: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """RoPE, centring, rotation, quantization and the paged write of a step.

    Parameters
    ----------
    q : torch.Tensor
        ``[num_tokens, num_heads, head_dim]`` before RoPE; its dtype is the activations' dtype.
    k, v : torch.Tensor
        ``[num_tokens, num_kv_heads, head_dim]``.
    cos_sin : torch.Tensor
        fp32 ``[num_positions, head_dim / 2, 2]``.
    pool : PagedPool
        Written at ``layer``.
    layer : int
    plan : StepPlan
        Gives positions and slots.
    rotate_v : bool
        Rotate V here; false when the rotation is folded into the weights.
    k_center : torch.Tensor, optional
        fp32 ``[num_kv_heads, head_dim]``, subtracted from all keys after RoPE.

    Returns
    -------
    tuple of torch.Tensor
        Rotated q, k and v, in the activations' dtype and the shapes of the inputs.
    """
    dtype, order = q.dtype, pool.format.hadamard_order
    angles = cos_sin[plan.positions]
    q, k, v = apply_rope(q, angles), apply_rope(k, angles), v.float()
    if k_center is not None:
        k = k - k_center
    q, k = rotate(q, order), rotate(k, order)
    if rotate_v:
        v = rotate(v, order)
    pool.write(layer, K, plan.write_blocks, plan.write_offsets, k)
    pool.write(layer, V, plan.write_blocks, plan.write_offsets, v)
    return q.to(dtype), k.to(dtype), v.to(dtype)


def paged_attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    pool: PagedPool,
    layer: int,
    plan: StepPlan,
    *,
    softmax_scale: float | None = None,
    window: int | None = None,
    softcap: float | None = None,
) -> torch.Tensor:
    """Attention of a mixed step: prefills to history and their own chunk, decodes to the pool.

    Parameters
    ----------
    q, k, v : torch.Tensor
        What :func:`rotate_quantize_kv` returned.
    pool : PagedPool
        Holds the history, and the decodes' current tokens.
    layer : int
    plan : StepPlan
    softmax_scale : float, optional
        Factor on q·k; 1/sqrt(head_dim) by default.
    window : int, optional
        Keys that a query sees, its own among them.
    softcap : float, optional
        Scores become ``softcap · tanh(score / softcap)``.

    Returns
    -------
    torch.Tensor
        ``[num_tokens, num_heads, head_dim]`` in q's dtype; in V's rotated basis where V is rotated.
    """
    scale = softmax_scale or 1 / math.sqrt(q.shape[-1])
    out = torch.empty_like(q)
    for p in plan.prefills:
        keys = _with_history(pool.read(layer, K, p.blocks), p.history, k[p.tokens])
        values = _with_history(pool.read(layer, V, p.blocks), p.history, v[p.tokens])
        chunk = q[p.tokens]
        for start in range(0, len(chunk), _QUERY_TILE):
            tile = chunk[start : start + _QUERY_TILE]
            last_key = (torch.arange(len(tile)) + (p.history + start))[None, None]
            heads = _attend(_by_kv_head(tile, keys.shape[0]), keys, values, last_key, scale, window, softcap)
            out[p.tokens][start : start + len(tile)] = heads.permute(2, 0, 1, 3).flatten(1, 2).to(q.dtype)
    if len(plan.decode_lengths):
        keys = _pad_keys(pool.read(layer, K, plan.decode_blocks))
        values = _pad_keys(pool.read(layer, V, plan.decode_blocks))
        tokens = q[plan.decode_tokens].float()
        grouped = tokens.unflatten(1, (keys.shape[1], -1)).unsqueeze(3)
        last_key = (plan.decode_lengths - 1)[:, None, None, None]
        heads = _attend(grouped, keys, values, last_key, scale, window, softcap)
        out[plan.decode_tokens] = heads.flatten(1, 2).flatten(-2).to(q.dtype)
    return out


def _by_kv_head(q: torch.Tensor, num_kv_heads: int) -> torch.Tensor:
    """``[n, num_heads, D]`` to fp32 ``[num_kv_heads, group, n, D]``."""
    return q.float().unflatten(1, (num_kv_heads, -1)).permute(1, 2, 0, 3)


def _pad_rows(x: torch.Tensor) -> torch.Tensor:
    return F.pad(x, (0, 0, 0, -x.shape[-2] % ROW_MULTIPLE))


def _pad_keys(x: torch.Tensor) -> torch.Tensor:
    return F.pad(x, (0, 0, 0, -x.shape[-2] % _KEY_MULTIPLE))


def _with_history(history: torch.Tensor, length: int, current: torch.Tensor) -> torch.Tensor:
    """``length`` rows of the pool and the chunk's own, ``[num_kv_heads, keys, D]``."""
    return _pad_keys(torch.cat([history[:, :length], current.float().transpose(0, 1)], dim=1))


def _attend(
    q: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    last_key: torch.Tensor,
    scale: float,
    window: int | None,
    softcap: float | None,
) -> torch.Tensor:
    """Softmax attention up to ``last_key [..., 1, 1, n]``, the index of the last key that a query sees.

    q is ``[..., num_kv_heads, group, n, D]``, keys and values are ``[..., num_kv_heads, L, D]``.
    """
    group, n = q.shape[-3:-1]
    rows = _pad_rows(q.flatten(-3, -2))
    scores = (rows @ keys.transpose(-1, -2))[..., : group * n, :].unflatten(-2, (group, n)) * scale
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    position = torch.arange(keys.shape[-2])
    visible = position <= last_key[..., None]
    if window is not None:
        visible &= position > last_key[..., None] - window
    probs = scores.masked_fill(~visible, -torch.inf).softmax(-1)
    # Rows that no query sees may hold anything, NaN too, and 0 · NaN is NaN.
    seen = visible.any(-2).squeeze(-2)
    values = values.masked_fill(~seen[..., None], 0.0)
    return (_pad_rows(probs.flatten(-3, -2)) @ values)[..., : group * n, :].unflatten(-2, (group, n))
