"""rotate_quantize_kv in plain PyTorch: a step's keys and values go to the pool.

Everything is computed in fp32 and rounded to the activations' dtype where a plugin's output tensor is.
"""

from __future__ import annotations

import torch

from saw_trtllm.backends.reference.cache import PagedPool, StepPlan
from saw_trtllm.backends.reference.gemm import products
from saw_trtllm.backends.reference.int4 import rotate
from saw_trtllm.backends.reference.invariant import aligned


def rope_angles(cos_sin: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Cosines and sines of a head's dims, fp32 ``[n, 1, head_dim]`` each, of ``[n, head_dim / 2, 2]``.

    The sines are negative in the first half, whose dims lose what those of the second half gain.
    """
    cos, sin = cos_sin[:, None].unbind(-1)
    return torch.cat([cos, cos], dim=-1), torch.cat([-sin, sin], dim=-1)


def apply_rope(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """Rotate NeoX half-split pairs (i, i + head_dim/2).

    Parameters
    ----------
    x : torch.Tensor
        ``[n, heads, head_dim]``.
    cos, sin : torch.Tensor
        What :func:`rope_angles` gives.
    """
    x = x.float()
    return (x * cos).add_(x.roll(x.shape[-1] // 2, -1).mul_(sin))


def apply_frame(x: torch.Tensor, frame: torch.Tensor) -> torch.Tensor:
    """Each head's rows times the matrix of its KV head.

    Parameters
    ----------
    x : torch.Tensor
        fp32 ``[n, heads, head_dim]``: ``heads`` is a multiple of ``num_kv_heads``.
    frame : torch.Tensor
        fp32 ``[num_kv_heads, head_dim, head_dim]``.
    """
    heads = x.unflatten(1, (len(frame), -1)).permute(1, 2, 0, 3)
    rows = products(heads.flatten(1, 2), aligned(frame)[:, None])[:, 0]
    return rows.unflatten(1, heads.shape[1:3]).permute(2, 0, 1, 3).flatten(1, 2)


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
    k_frame: torch.Tensor | None = None,
    q_frame: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """RoPE, centring, rotation or frame, quantization and the paged write of a step.

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
    k_frame, q_frame : torch.Tensor, optional
        fp32 ``[num_kv_heads, head_dim, head_dim]``, in place of the rotation of K and of Q: centred keys become
        ``k @ k_frame`` and the queries of the head's group ``q @ q_frame``. ``k_frame @ q_frame.mT`` is the identity,
        so that scores stay as they are. Both or neither; V is not concerned.

    Returns
    -------
    tuple of torch.Tensor
        Rotated q, k and v, in the activations' dtype and the shapes of the inputs.
    """
    dtype, order = q.dtype, pool.format.hadamard_order
    if cos_sin not in plan.angles:
        plan.angles[cos_sin] = rope_angles(cos_sin[plan.positions])
    heads = [q.shape[1], k.shape[1]]
    both = apply_rope(torch.cat([q, k], dim=1), *plan.angles[cos_sin])
    if k_center is not None:
        both[:, heads[0] :] -= k_center
    if k_frame is None or q_frame is None:
        q, k = rotate(both, order).split(heads, dim=1)
    else:
        q, k = both.split(heads, dim=1)
        q, k = apply_frame(q, q_frame), apply_frame(k, k_frame)
    values = rotate(v, order) if rotate_v else v.float()
    pool.write(layer, plan.write_blocks, plan.write_offsets, k, values)
    return q.to(dtype), k.to(dtype), values.to(dtype) if rotate_v else v
