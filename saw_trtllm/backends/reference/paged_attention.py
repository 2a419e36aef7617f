"""paged_attention in plain PyTorch: a step's queries attend to the pool.

Everything is computed in fp32 and rounded to the activations' dtype where a plugin's output tensor is.
Each query's result is independent of what else is in the step, down to the last bit: see
:mod:`saw_trtllm.backends.reference.invariant`. Here it means, too, that sums over keys are made tile by tile.
"""

from __future__ import annotations

import math
from functools import reduce

import torch

from saw_trtllm.backends.reference.cache import KEY_TILE, PagedPool, Prefill, StepPlan
from saw_trtllm.backends.reference.gemm import products, row_sum
from saw_trtllm.backends.reference.invariant import aligned, exp, pad_rows, tanh

#: Queries of a prefill that are attended at a time, so that scores do not grow with chunk x context.
_QUERY_TILE = 512


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
        keys, values = _with_history(pool, layer, p, k, v, window)
        for start in range(p.tokens.start, p.tokens.stop, _QUERY_TILE):
            tile = slice(start, min(start + _QUERY_TILE, p.tokens.stop))
            rows = q[tile].float().unflatten(1, (len(keys), -1)).permute(1, 2, 0, 3)
            hidden = _hidden(keys.shape[1], plan.slots[tile, None], window)
            weights = _weights(rows.flatten(1, 2), keys, hidden, scale, softcap)
            heads = _weighted_mean(weights, values)
            out[tile] = heads.unflatten(1, rows.shape[1:3]).permute(2, 0, 1, 3).flatten(1, 2).to(q.dtype)
    for d in plan.decodes(window):
        keys, values = pool.read(layer, d.blocks, d.used)
        rows = q[d.tokens].float().unflatten(1, (keys.shape[1], -1))
        heads = _weighted_mean(_weights(rows, keys, d.hidden, scale, softcap), values)
        out[d.tokens] = heads.flatten(1, 2)
    return out


def _with_history(
    pool: PagedPool, layer: int, p: Prefill, keys: torch.Tensor, values: torch.Tensor, window: int | None
) -> tuple[torch.Tensor, torch.Tensor]:
    """The pool's rows and the chunk's own, fp32 ``[num_kv_heads, keys, D]``, padded to whole tiles."""
    keys, values = (x[p.tokens].float().transpose(0, 1) for x in (keys, values))
    if p.history:
        place, used = torch.arange(len(p.blocks) * pool.tokens_per_block), None
        if window is not None:
            used = ((place < p.history) & (place > p.history - window))[None].int()
        read = (x[0, :, : p.history] for x in pool.read(layer, p.blocks[None], used))
        keys, values = (torch.cat(pair, dim=1) for pair in zip(read, (keys, values), strict=True))
    keys, values = (aligned(pad_rows(x, KEY_TILE)) for x in (keys, values))
    return keys, values


def _hidden(num_keys: int, last_key: torch.Tensor, window: int | None) -> torch.Tensor:
    """The keys that queries do not see, given the last that each sees, ``[n, 1]``: bool ``[tiles, n, KEY_TILE]``."""
    position = torch.arange(num_keys).view(-1, 1, KEY_TILE)
    hidden = position > last_key
    if window is not None:
        hidden |= position <= last_key - window
    return hidden


def _weights(
    q: torch.Tensor, keys: torch.Tensor, hidden: torch.Tensor, scale: float, softcap: float | None
) -> torch.Tensor:
    """What each row of ``q`` gives to the keys that are not hidden from it: softmax without its division.

    Parameters
    ----------
    q : torch.Tensor
        fp32 ``[..., num_kv_heads, heads · n, D]``: n queries of each head that shares these keys.
    keys : torch.Tensor
        fp32 ``[..., num_kv_heads, tiles · KEY_TILE, D]``, finite where they are hidden too.
    hidden : torch.Tensor
        bool ``[..., num_kv_heads or 1, tiles, n, KEY_TILE]``.

    Returns
    -------
    torch.Tensor
        fp32 ``[..., num_kv_heads, tiles, heads · n, KEY_TILE]``.
    """
    scores = products(q, keys.unflatten(-2, (-1, KEY_TILE)).mT) * scale
    if softcap is not None:
        scores = softcap * tanh(scores / softcap)
    scores.unflatten(-2, (-1, hidden.shape[-2])).masked_fill_(hidden.unsqueeze(-3), -torch.inf)
    return exp(scores - scores.amax((-3, -1), keepdim=True))


def _weighted_mean(weights: torch.Tensor, values: torch.Tensor) -> torch.Tensor:
    """Of ``values``, fp32 ``[..., num_kv_heads, tiles · KEY_TILE, D]``, for each row: ``[..., num_kv_heads, n, D]``."""
    # One tile after the other: the order of a longer sum would depend on the longest sequence of the batch.
    total = reduce(torch.add, row_sum(weights).unbind(-3))
    values = values.unflatten(-2, (-1, 1, KEY_TILE))
    heads = products(weights, values).squeeze(-3)
    return reduce(torch.add, heads.unbind(-3)) / total
