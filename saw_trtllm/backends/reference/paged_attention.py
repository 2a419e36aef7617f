"""paged_attention in plain PyTorch: a step's queries attend to the pool.

Everything is computed in fp32 and rounded to the activations' dtype where a plugin's output tensor is.
Each query's result is independent of what else is in the step, down to the last bit: see
:mod:`saw_trtllm.backends.reference.invariant`. Here it means, too, that sums over keys are made tile by tile.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from functools import reduce

import torch

from saw_trtllm.backends.reference.cache import KEY_TILE, K, PagedPool, Prefill, StepPlan, V
from saw_trtllm.backends.reference.gemm import products, row_sum
from saw_trtllm.backends.reference.invariant import aligned, exp, pad_rows, tanh

#: Queries of a prefill that are attended at a time, so that scores do not grow with chunk x context.
_QUERY_TILE = 512
#: Elements of keys that decodes read at a time, 4 MiB of fp32.
_DECODE_ELEMENTS = 1 << 20


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
        keys, values = (
            _with_history(pool, layer, which, p, x[p.tokens].float().transpose(0, 1), window)
            for which, x in ((K, k), (V, v))
        )
        for start in range(0, p.tokens.stop - p.tokens.start, _QUERY_TILE):
            tile = slice(p.tokens.start + start, min(p.tokens.start + start + _QUERY_TILE, p.tokens.stop))
            rows = q[tile].float().unflatten(1, (len(keys), -1)).permute(1, 2, 0, 3)
            last_key = plan.slots[tile].repeat(rows.shape[1])[:, None]
            weights = _weights(rows.flatten(1, 2), keys, last_key, scale, window, softcap)
            heads = _weighted_mean(weights, values)
            out[tile] = heads.unflatten(1, rows.shape[1:3]).permute(2, 0, 1, 3).flatten(1, 2).to(q.dtype)
    for group in _decode_groups(plan, k[0].numel() * pool.tokens_per_block):
        lengths, blocks = plan.decode_lengths[group], plan.decode_blocks[group]
        seen = None if window is None else lengths - window
        keys = pool.read(layer, K, blocks, lengths, seen)
        first = plan.decode_tokens.start
        tokens = slice(first + group.start, first + group.start + len(lengths))
        rows = q[tokens].float().unflatten(1, (keys.shape[1], -1))
        last_key = (lengths - 1)[:, None, None, None, None]
        weights = _weights(rows, keys, last_key, scale, window, softcap)
        # Values come to where the keys were, which is in the processor's caches still.
        del keys
        heads = _weighted_mean(weights, pool.read(layer, V, blocks, lengths, seen))
        out[tokens] = heads.flatten(1, 2).to(q.dtype)
    return out


def _decode_groups(plan: StepPlan, block_elements: int) -> Iterator[slice]:
    """So many decodes at a time that calls are not too short and that what they read stays in a cache.

    Their number is a power of two, so that few calls make all of their products.
    """
    num_decodes, num_blocks = plan.decode_blocks.shape
    fitting = max(1, _DECODE_ELEMENTS // max(1, num_blocks * block_elements))
    size = 1 << (fitting.bit_length() - 1)
    return (slice(start, start + size) for start in range(0, num_decodes, size))


def _with_history(
    pool: PagedPool, layer: int, which: int, p: Prefill, current: torch.Tensor, window: int | None
) -> torch.Tensor:
    """The pool's rows and the chunk's own, fp32 ``[num_kv_heads, keys, D]``, padded to whole tiles."""
    if p.history:
        seen = [] if window is None else [torch.tensor(p.history), torch.tensor(p.history - window + 1)]
        current = torch.cat([pool.read(layer, which, p.blocks, *seen)[:, : p.history], current], dim=1)
    return aligned(pad_rows(current, KEY_TILE))


def _weights(
    q: torch.Tensor,
    keys: torch.Tensor,
    last_key: torch.Tensor,
    scale: float,
    window: int | None,
    softcap: float | None,
) -> torch.Tensor:
    """What each row of ``q`` gives to the keys up to its ``last_key``: softmax without its division.

    Parameters
    ----------
    q : torch.Tensor
        fp32 ``[..., num_kv_heads, n, D]``.
    keys : torch.Tensor
        fp32 ``[..., num_kv_heads, tiles · KEY_TILE, D]``, finite beyond ``last_key`` too.
    last_key : torch.Tensor
        int64 ``[..., num_kv_heads or 1, tiles or 1, n or 1, 1]``.

    Returns
    -------
    torch.Tensor
        fp32 ``[..., num_kv_heads, tiles, n, KEY_TILE]``.
    """
    keys = keys.unflatten(-2, (-1, KEY_TILE))
    scores = products(q, keys.mT) * scale
    if softcap is not None:
        scores = softcap * tanh(scores / softcap)
    position = torch.arange(keys.shape[-3] * KEY_TILE).view(-1, 1, KEY_TILE)
    hidden = position > last_key
    if window is not None:
        hidden |= position <= last_key - window
    scores.masked_fill_(hidden, -torch.inf)
    return exp(scores - scores.amax((-3, -1), keepdim=True))


def _weighted_mean(weights: torch.Tensor, values: torch.Tensor) -> torch.Tensor:
    """Of ``values``, fp32 ``[..., num_kv_heads, tiles · KEY_TILE, D]``, for each row: ``[..., num_kv_heads, n, D]``."""
    # One tile after the other: the order of a longer sum would depend on the longest sequence of the batch.
    total = reduce(torch.add, row_sum(weights).unbind(-3))
    values = values.unflatten(-2, (-1, 1, KEY_TILE))
    heads = products(weights, values).squeeze(-3)
    return reduce(torch.add, heads.unbind(-3)) / total
