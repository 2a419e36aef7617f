"""Steps of the write with what the CPU reference and float64 make of them: every byte of the pool, and Q, K and V."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch

from saw_trtllm import ops
from saw_trtllm.backends.reference.cache import PagedPool, StepPlan
from saw_trtllm.backends.reference.int4 import rotate, unpack
from saw_trtllm.backends.reference.rotate_quantize_kv import rotate_quantize_kv
from saw_trtllm.engine.step import DECODE, PREFILL, StepInputs
from saw_trtllm.format import CODE_MAX, CODE_MAX_8, ROW_TAIL_BYTES, KVFormat
from tests.support.frames import random_frames
from tests.support.paged import LAYER, NUM_LAYERS, Table, random_pool, rows_of, wide
from tests.support.tolerance import EPS, changed_share, rotated_rounding, spacing, stored_rounding

DTYPES = {"float16": torch.float16, "bfloat16": torch.bfloat16}
NUM_POSITIONS = 4096
# (history, tokens of this step): prefills with and without history, decodes, block borders.
MIXED = [(0, 37), (60, 5), (3, 130), (0, 1), (15, 1), (16, 1), (63, 1), (64, 1), (500, 1)]
LARGE = [(0, 600), (33, 50), (127, 1)]
LONG = [(0, 3000), (100, 2500), (63, 1)]  # several items for each warp that a GPU holds


@dataclass
class Step:
    """A step's inputs on the CPU, and the outputs that a run leaves."""

    kv_format: KVFormat
    table: Table
    qkv: torch.Tensor
    cos_sin: torch.Tensor
    position_ids: torch.Tensor
    last_token_ids: torch.Tensor
    sequence_length: torch.Tensor
    pool: torch.Tensor
    num_heads: int
    k_center: torch.Tensor | None = None
    #: Of keys and of queries, float32 ``[num_kv_heads, head_dim, head_dim]``.
    frames: list[torch.Tensor] | None = None

    @property
    def num_kv_heads(self) -> int:
        return self.pool.shape[-3]

    def split(self) -> list[torch.Tensor]:
        heads = [self.num_heads, self.num_kv_heads, self.num_kv_heads]
        return list(self.qkv.unflatten(1, (-1, self.kv_format.head_dim)).split(heads, dim=1))


def make_step(
    kv_format,
    sequences,
    rng,
    *,
    dtype="float16",
    heads=(8, 2),
    tokens_per_block=32,
    center=False,
    outliers=True,
    frames=False,
) -> Step:
    num_heads, num_kv_heads = heads
    lengths = [history + new for history, new in sequences]
    table = Table.make(lengths, tokens_per_block, rng)
    counts = torch.tensor([new for _, new in sequences])
    num_tokens, head_dim = int(counts.sum()), kv_format.head_dim
    rows = torch.randn(num_tokens, num_heads + 2 * num_kv_heads, head_dim, generator=rng)
    rows *= torch.rand(num_tokens, rows.shape[1], 1, generator=rng) * 4
    if outliers and num_tokens:
        rows[:, :, 5] *= 20
        rows[0, -1] = 0.25  # a constant row of V
        rows[-1, num_heads] = 0.0  # a row of zeros of K
    positions = torch.cat([torch.arange(h, h + n) for h, n in sequences])
    angle = torch.rand(NUM_POSITIONS, head_dim // 2, generator=rng) * 6.28
    center_rows = torch.randn(num_kv_heads, head_dim, generator=rng) if center else None
    return Step(
        kv_format=kv_format,
        table=table,
        qkv=rows.flatten(1).to(DTYPES[dtype]),
        cos_sin=torch.stack([angle.cos(), angle.sin()], dim=-1),
        position_ids=positions.int(),
        last_token_ids=counts.cumsum(0).int(),
        sequence_length=torch.tensor(lengths, dtype=torch.int32),
        pool=random_pool(kv_format, table.num_blocks, num_kv_heads, tokens_per_block, rng),
        num_heads=num_heads,
        k_center=center_rows,
        frames=[torch.from_numpy(x) for x in random_frames((num_kv_heads,), head_dim)] if frames else None,
    )


def launch(step: Step, tensors: dict[str, torch.Tensor], stream=None) -> None:
    ops.rotate_quantize_kv(
        **tensors, kv_format=step.kv_format, layer=LAYER, stream=stream or torch.cuda.current_stream().cuda_stream
    )


def device_tensors(step: Step, current: bool = True) -> dict[str, torch.Tensor]:
    names = ("qkv", "cos_sin", "position_ids", "last_token_ids", "sequence_length", "pool")
    tensors = {name: getattr(step, name).cuda() for name in names}
    tensors["block_offsets"] = step.table.offsets.cuda()
    if step.k_center is not None:
        tensors["k_center"] = step.k_center.cuda()
    if step.frames is not None:
        packed = [torch.from_numpy(ops.pack_frame(frame.numpy())).cuda() for frame in step.frames]
        tensors |= dict(zip(("k_frame", "q_frame"), packed, strict=True))
    q, k, v = (torch.full(x.shape, torch.nan, dtype=x.dtype, device="cuda") for x in step.split())
    tensors["q_out"] = q
    return {**tensors, "k_out": k, "v_out": v} if current else tensors


def run(step: Step, current: bool = True) -> dict[str, torch.Tensor]:
    tensors = device_tensors(step, current)
    launch(step, tensors)
    torch.cuda.synchronize()
    return {name: x.cpu() for name, x in tensors.items()}


def reference(step: Step) -> dict[str, torch.Tensor]:
    """The CPU reference's outputs. It wants prefills before decodes, which the sequences here are."""
    counts = np.diff(step.last_token_ids.numpy(), prepend=0)
    kinds = np.where(counts > 1, PREFILL, DECODE).astype(np.int32)
    inputs = StepInputs(
        input_ids=np.zeros(len(step.qkv), np.int32),
        position_ids=step.position_ids.numpy(),
        last_token_ids=step.last_token_ids.numpy(),
        sequence_length=step.sequence_length.numpy(),
        context_lengths=counts.astype(np.int32),
        host_request_types=kinds,
        kv_cache_block_offsets=step.table.offsets[None].numpy(),
    )
    pool = PagedPool(step.kv_format, 1, NUM_LAYERS, step.num_kv_heads, step.pool.shape[-2])
    pool.data = step.pool.clone()
    outputs = rotate_quantize_kv(
        *step.split(),
        step.cos_sin,
        pool,
        LAYER,
        StepPlan.make(inputs, pool),
        rotate_v=step.kv_format.rotate_v,
        k_center=step.k_center,
        **dict(zip(("k_frame", "q_frame"), step.frames or (), strict=False)),
    )
    return dict(zip(("q_out", "k_out", "v_out"), outputs, strict=True), pool=pool.data)


def written_rows(step: Step) -> torch.Tensor:
    """Bool ``[num_blocks, tokens_per_block]``: the slots of this step's tokens."""
    tokens_per_block = step.pool.shape[-2]
    written = torch.zeros(step.pool.shape[0], tokens_per_block, dtype=torch.bool)
    ends = step.last_token_ids.tolist()
    for s, (begin, end) in enumerate(zip([0, *ends], ends, strict=False)):
        slot = torch.arange(end - begin) + int(step.sequence_length[s]) - (end - begin)
        written[step.table.blocks[s, slot // tokens_per_block], slot % tokens_per_block] = True
    return written


def exact_queries_and_keys(step: Step) -> tuple[torch.Tensor, torch.Tensor]:
    """Q and K after RoPE and centring in float64: ``[num_tokens, heads, head_dim]``."""
    angles = step.cos_sin.double()[step.position_ids.long()]
    cos, sin = angles[:, None, :, 0], angles[:, None, :, 1]
    pairs = [x.double().chunk(2, dim=-1) for x in step.split()[:2]]
    q, k = (torch.cat([a * cos - b * sin, b * cos + a * sin], dim=-1) for a, b in pairs)
    return q, k if step.k_center is None else k - step.k_center.double()


def framed(x: torch.Tensor, frame: torch.Tensor) -> torch.Tensor:
    """Rows ``[num_tokens, heads, head_dim]`` times the frame of their KV head, in float64."""
    return torch.einsum("nhgd,hde->nhge", x.unflatten(1, (len(frame), -1)), frame.double()).flatten(1, 2)


def frame_error(head_dim: int) -> float:
    """Of a product of split numbers: three terms are left out, and each of head_dim / 16 steps rounds its sum."""
    return (3 * 2 + head_dim / 16) * 2.0**-23


def exact_rows(step: Step) -> tuple[torch.Tensor, torch.Tensor]:
    """K and V as they are quantized, in float64: ``[num_tokens, num_kv_heads, head_dim]``."""
    _, k = exact_queries_and_keys(step)
    order = step.kv_format.hadamard_order
    matrix = rotate(torch.eye(order), order).sign().double() / order**0.5 if order > 1 else torch.ones(1, 1).double()

    def turned(x: torch.Tensor) -> torch.Tensor:
        return (x.unflatten(-1, (-1, order)) @ matrix).flatten(-2)

    v = step.split()[2].double()
    return (
        turned(k) if step.frames is None else framed(k, step.frames[0]),
        turned(v) if step.kv_format.rotate_v else v,
    )


def rounding(step: Step) -> torch.Tensor:
    """How far fp32 may be off those rows: ``[num_tokens, 2, num_kv_heads, head_dim]``."""
    order = step.kv_format.hadamard_order
    bounds = [rotated_rounding(order, x.abs().amax(-1, keepdim=True)).expand_as(x) for x in exact_rows(step)]
    if step.frames is not None:
        _, k = exact_queries_and_keys(step)
        bounds[0] = frame_error(step.kv_format.head_dim) * framed(k.abs(), step.frames[0].abs())
    return torch.stack(bounds, dim=1)


def assert_close_outputs(got: torch.Tensor, want: torch.Tensor) -> None:
    """Equal but for fp32's rounding before the last: seldom another number, and then the next one."""
    assert got.dtype == want.dtype
    assert got.isfinite().all()
    exact = want.double()
    rounding = rotated_rounding(exact.shape[-1], exact.abs().amax(-1, keepdim=True))
    assert ((got.double() - exact).abs() <= 2 * stored_rounding(exact, want.dtype, rounding)).all()
    assert (got != want).double().mean() <= changed_share(rounding.expand_as(exact), spacing(exact, want.dtype))


def assert_pool(step: Step, got: torch.Tensor, want: torch.Tensor) -> None:
    """Canaries, tails and codes of a pool of rows of codes, after the reference's and after float64."""
    written = written_rows(step)
    layers = [n for n in range(NUM_LAYERS) if n != LAYER]
    assert torch.equal(got[:, layers], step.pool[:, layers])
    order = token_order(step)
    for which, exact in enumerate(exact_rows(step)):
        # [blocks, rows, kv_heads, bytes]
        ours = [rows_of(x, step.kv_format, which)[:, LAYER].transpose(1, 2) for x in (got, want, step.pool)]
        assert torch.equal(ours[0][~written], ours[2][~written])
        assert_rows(step, which, ours[0][written], ours[1][written], exact[order], rounding(step)[order][:, which])


def assert_rows(
    step: Step, which: int, got: torch.Tensor, want: torch.Tensor, exact: torch.Tensor, errors: torch.Tensor
) -> None:
    """Tails and codes of rows of K or of V, ``[num_tokens, kv_heads, bytes]``."""
    is_wide = wide(step.kv_format, which)
    largest_code = CODE_MAX_8 if is_wide else CODE_MAX
    tails = [x[..., -ROW_TAIL_BYTES:].contiguous().view(torch.float16).double() for x in (got, want)]
    # A range on the border of two fp16 numbers falls to either side by the last bit of an fp32 sum.
    ulp, largest = spacing(tails[1], torch.float16), errors.amax(-1, keepdim=True)
    assert ((tails[0] - tails[1]).abs() <= ulp).all()
    tail_errors = torch.cat([largest * 2 / largest_code, largest], dim=-1)  # of scale and of lo
    assert (tails[0] != tails[1]).double().mean() <= changed_share(tail_errors, ulp)
    codes = [x[..., :-ROW_TAIL_BYTES].contiguous() for x in (got, want)]
    codes = codes if is_wide else [unpack(x) for x in codes]
    scale, lo = tails[0].split(1, dim=-1)
    near = (largest_code + 1) * EPS + errors / scale
    same_tail = (tails[0] == tails[1]).all(-1)
    different = (codes[0] != codes[1])[same_tail]
    quotient = ((exact - lo) / scale).clamp(0, largest_code)
    # Rows of 16-bit numbers, turned by a factor of a power of two or not at all, lie between two codes now and then.
    ties = quotient % 1 == 0.5
    assert different.double().mean() <= changed_share(near[same_tail], 1.0) + ties[same_tail].double().mean()

    # Each code is the nearest to the exact row under the tail that is stored, but for quotients next to a half.
    assert ((codes[0].double() - quotient).abs() <= 0.5 + near).all()


def token_order(step: Step) -> torch.Tensor:
    """Tokens in the order of their slots in the pool, which is that of ``pool[written]``."""
    tokens_per_block = step.pool.shape[-2]
    places = []
    ends = step.last_token_ids.tolist()
    for s, (begin, end) in enumerate(zip([0, *ends], ends, strict=False)):
        slot = torch.arange(end - begin) + int(step.sequence_length[s]) - (end - begin)
        places.append(step.table.blocks[s, slot // tokens_per_block] * tokens_per_block + slot % tokens_per_block)
    return torch.cat(places).argsort()


def check(step: Step) -> None:
    got, want = run(step), reference(step)
    for name in ("q_out", "k_out", "v_out"):
        assert_close_outputs(got[name], want[name])
    assert_pool(step, got["pool"], want["pool"])


def saw(head_dim: int, order: int, **kwargs) -> KVFormat:
    if order == 1:
        return KVFormat("int4", head_dim, **kwargs)
    return KVFormat("saw_int4", head_dim, hadamard_order=order, **kwargs)
