"""rotate_quantize_kv against the CPU reference: every byte of the pool, and the rotated Q, K and V."""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
import pytest
import torch

from saw_trtllm import ops
from saw_trtllm.backends.reference.attention import apply_rope, rotate_quantize_kv
from saw_trtllm.backends.reference.cache import PagedPool, StepPlan
from saw_trtllm.backends.reference.int4 import rotate, unpack
from saw_trtllm.engine.step import DECODE, PREFILL, StepInputs
from saw_trtllm.errors import OpError
from saw_trtllm.format import ROW_TAIL_BYTES, KVFormat, hadamard_orders
from tests.support.paged import LAYER, NUM_LAYERS, Table, random_pool

DTYPES = {"float16": torch.float16, "bfloat16": torch.bfloat16}
NUM_POSITIONS = 4096
# (history, tokens of this step): prefills with and without history, decodes, block borders.
MIXED = [(0, 37), (60, 5), (3, 130), (0, 1), (15, 1), (16, 1), (63, 1), (64, 1), (500, 1)]
LARGE = [(0, 600), (33, 50), (127, 1)]
LONG = [(0, 3000), (100, 2500), (63, 1)]  # several items for each warp that a GPU holds
ALL_ORDERS = [(d, o) for d in (64, 96, 128, 256) for o in (1, *hadamard_orders(d))]


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

    @property
    def num_kv_heads(self) -> int:
        return self.pool.shape[3]

    def split(self) -> list[torch.Tensor]:
        heads = [self.num_heads, self.num_kv_heads, self.num_kv_heads]
        return list(self.qkv.unflatten(1, (-1, self.kv_format.head_dim)).split(heads, dim=1))


def make_step(
    kv_format, sequences, rng, *, dtype="float16", heads=(8, 2), tokens_per_block=32, center=False, outliers=True
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
    pool = PagedPool(step.kv_format, 1, NUM_LAYERS, step.num_kv_heads, step.pool.shape[4])
    pool.data = step.pool.clone()
    outputs = rotate_quantize_kv(
        *step.split(),
        step.cos_sin,
        pool,
        LAYER,
        StepPlan.make(inputs, pool),
        rotate_v=step.kv_format.rotate_v,
        k_center=step.k_center,
    )
    return dict(zip(("q_out", "k_out", "v_out"), outputs, strict=True), pool=pool.data)


def written_rows(step: Step) -> torch.Tensor:
    """Bool ``[num_blocks, tokens_per_block]``: the slots of this step's tokens."""
    tokens_per_block = step.pool.shape[4]
    written = torch.zeros(step.pool.shape[0], tokens_per_block, dtype=torch.bool)
    ends = step.last_token_ids.tolist()
    for s, (begin, end) in enumerate(zip([0, *ends], ends, strict=False)):
        slot = torch.arange(end - begin) + int(step.sequence_length[s]) - (end - begin)
        written[step.table.blocks[s, slot // tokens_per_block], slot % tokens_per_block] = True
    return written


def exact_rows(step: Step) -> tuple[torch.Tensor, torch.Tensor]:
    """K and V after RoPE, centring and rotation in float64: ``[num_tokens, num_kv_heads, head_dim]``."""
    _, k, v = (x.double() for x in step.split())
    angles = step.cos_sin.double()[step.position_ids.long()]
    cos, sin = angles[:, None, :, 0], angles[:, None, :, 1]
    a, b = k.chunk(2, dim=-1)
    k = torch.cat([a * cos - b * sin, b * cos + a * sin], dim=-1)
    if step.k_center is not None:
        k -= step.k_center.double()
    order = step.kv_format.hadamard_order
    matrix = rotate(torch.eye(order), order).sign().double() / order**0.5 if order > 1 else torch.ones(1, 1).double()

    def turned(x: torch.Tensor) -> torch.Tensor:
        return (x.unflatten(-1, (-1, order)) @ matrix).flatten(-2)

    return turned(k), turned(v) if step.kv_format.rotate_v else v


def assert_close_outputs(got: torch.Tensor, want: torch.Tensor) -> None:
    """Equal but for fp32's rounding before the last: seldom another number, and then the next one."""
    assert got.dtype == want.dtype
    assert got.isfinite().all()
    error = (got.double() - want.double()).abs()
    largest = want.double().abs().amax(-1, keepdim=True)
    ulp = torch.finfo(want.dtype).eps * want.double().abs()
    assert (error <= ulp + 1e-6 * largest + 6e-8).all()
    assert (got != want).double().mean() < 0.03


def assert_pool(step: Step, got: torch.Tensor, want: torch.Tensor) -> None:
    """Canaries, tails and codes of a pool of 4-bit rows, after the reference's and after float64."""
    written = written_rows(step)
    layers = [n for n in range(NUM_LAYERS) if n != LAYER]
    assert torch.equal(got[:, layers], step.pool[:, layers])
    ours = [x[:, LAYER].permute(0, 3, 1, 2, 4) for x in (got, want, step.pool)]  # [blocks, rows, 2, kv_heads, bytes]
    assert torch.equal(ours[0][~written], ours[2][~written])
    got, want = ours[0][written], ours[1][written]  # [num_tokens, 2, kv_heads, bytes]

    tails = [x[..., -ROW_TAIL_BYTES:].contiguous().view(torch.float16).double() for x in (got, want)]
    # A range on the border of two fp16 numbers falls to either side by the last bit of an fp32 sum.
    ulp = 2.0 ** (tails[1].abs().clamp_min(2.0**-14).log2().floor() - 10)
    assert ((tails[0] - tails[1]).abs() <= ulp).all()
    assert (tails[0] != tails[1]).double().mean() < 0.01
    codes = [unpack(x[..., :-ROW_TAIL_BYTES].contiguous()) for x in (got, want)]
    same_tail = (tails[0] == tails[1]).all(-1)
    different = (codes[0] != codes[1])[same_tail]
    # Seldom: next to a half. Rows of 16-bit numbers that nothing rotates lie right on one now and then.
    assert different.double().mean() < 5e-4

    # Each code is the nearest to the exact row under the tail that is stored, but for quotients next to a half.
    scale, lo = tails[0].split(1, dim=-1)
    exact = torch.stack(exact_rows(step), dim=1)[token_order(step)]
    quotient = ((exact - lo) / scale).clamp(0, 15)
    near = 1e-6 * (1 + exact.abs().amax(-1, keepdim=True) / scale)
    assert ((codes[0].double() - quotient).abs() <= 0.5 + near).all()


def token_order(step: Step) -> torch.Tensor:
    """Tokens in the order of their slots in the pool, which is that of ``pool[written]``."""
    tokens_per_block = step.pool.shape[4]
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


@pytest.mark.parametrize("sequences", [MIXED, LARGE], ids=["small", "large"])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("head_dim", "order"), ALL_ORDERS)
def test_rows_are_the_references(head_dim, order, dtype, sequences, rng):
    check(make_step(saw(head_dim, order), sequences, rng, dtype=dtype))


@pytest.mark.parametrize("tokens_per_block", [16, 32, 64, 128])
@pytest.mark.parametrize("heads", [(1, 1), (4, 1), (7, 7), (12, 4), (15, 3), (32, 8), (64, 8)])
def test_heads_and_blocks(heads, tokens_per_block, rng):
    check(make_step(saw(128, 128), MIXED, rng, heads=heads, tokens_per_block=tokens_per_block))


@pytest.mark.parametrize("sequences", [MIXED, LARGE], ids=["small", "large"])
@pytest.mark.parametrize("head_dim", [64, 96, 128, 256])
def test_centre_range_factor_and_a_v_that_stays(head_dim, sequences, rng):
    kv_format = KVFormat("saw_int4", head_dim, rotate_v=False, range_factor=0.9)
    check(make_step(kv_format, sequences, rng, dtype="bfloat16", center=True))


@pytest.mark.parametrize("rotate_v", [False, True])
@pytest.mark.parametrize("head_dim", [64, 96, 128, 256])
def test_a_warp_works_on_item_after_item(head_dim, rotate_v, rng):
    kv_format = KVFormat("saw_int4", head_dim, rotate_v=rotate_v)
    check(make_step(kv_format, LONG, rng, dtype="bfloat16", heads=(9, 3), center=rotate_v))


@pytest.mark.parametrize("sequences", [MIXED, LONG], ids=["small", "long"])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("head_dim", [64, 96, 128, 256])
def test_raw_cache_holds_the_current_rows(head_dim, dtype, sequences, rng):
    step = make_step(KVFormat("fp16", head_dim, dtype=dtype), sequences, rng, dtype=dtype)
    got, want = run(step), reference(step)
    for name in ("q_out", "k_out", "v_out"):
        assert_close_outputs(got[name], want[name])
    written = written_rows(step)
    rows = got["pool"][:, LAYER].permute(0, 3, 1, 2, 4)
    current = torch.stack([got["k_out"], got["v_out"]], dim=1)[token_order(step)]
    assert torch.equal(rows[written], current.view(torch.uint8))
    untouched = step.pool[:, LAYER].permute(0, 3, 1, 2, 4)
    assert torch.equal(rows[~written], untouched[~written])


def test_without_current_rows_the_pool_is_the_same(rng):
    step = make_step(saw(128, 128), MIXED, rng)
    assert torch.equal(run(step)["pool"], run(step, current=False)["pool"])


@pytest.mark.parametrize("sequences", [MIXED, LARGE], ids=["small", "large"])
def test_two_runs_are_the_same_to_the_bit(sequences, rng):
    step = make_step(saw(128, 128), sequences, rng)
    first, second = run(step), run(step)
    for name in ("pool", "q_out", "k_out", "v_out"):
        assert torch.equal(first[name], second[name])


@pytest.mark.parametrize("num_sequences", [1, 31, 32, 33, 63, 65, 1000, 1024, 1500])
def test_each_token_finds_its_sequence(num_sequences, rng):
    counts = torch.randint(0, 3, (num_sequences,), generator=rng)  # some sequences compute nothing in this step
    counts[num_sequences // 2] = 2
    histories = torch.randint(1, 70, (num_sequences,), generator=rng)
    sequences = list(zip(histories.tolist(), counts.tolist(), strict=True))
    step = make_step(saw(64, 64), sequences, rng, heads=(1, 1), tokens_per_block=16, outliers=False)
    got = run(step)["pool"]
    written = written_rows(step)
    rows, before = (x[:, LAYER].permute(0, 3, 1, 2, 4) for x in (got, step.pool))
    assert torch.equal(rows[~written], before[~written])
    # The scale of every row tells tokens apart.
    exact = torch.stack(exact_rows(step), dim=1)[token_order(step)]
    scale = rows[written][..., -ROW_TAIL_BYTES:].contiguous().view(torch.float16)[..., 0].double()
    expected = step.kv_format.range_factor * (exact.amax(-1) - exact.amin(-1)) / 15
    torch.testing.assert_close(scale, expected, rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize("sequences", [MIXED, LONG], ids=["small", "long"])
def test_tokens_of_no_sequence_are_rotated_and_not_stored(sequences, rng):
    step = make_step(saw(128, 128), sequences, rng)
    whole = run(step)
    cut = replace(
        step,
        last_token_ids=step.last_token_ids[:-2],
        sequence_length=step.sequence_length[:-2],
        table=replace(step.table, offsets=step.table.offsets[:-2]),
    )
    got = run(cut)
    written = written_rows(cut)
    rows, before, full = (x[:, LAYER].permute(0, 3, 1, 2, 4) for x in (got["pool"], step.pool, whole["pool"]))
    assert torch.equal(rows[~written], before[~written])
    assert torch.equal(rows[written], full[written])
    for name in ("q_out", "k_out", "v_out"):
        assert torch.equal(got[name], whole[name])


def test_no_tokens(rng):
    step = make_step(saw(128, 128), [(5, 0), (9, 0)], rng)
    assert torch.equal(run(step)["pool"], step.pool)


def test_graph_replays_see_new_inputs(rng):
    first, other = (make_step(saw(128, 128), MIXED, rng) for _ in range(2))
    shorter = first.sequence_length - torch.tensor([0, 2, 3, 0, 1, 0, 1, 0, 99]).int()
    second = replace(other, sequence_length=shorter, table=first.table, pool=first.pool)
    run(first)  # what is loaded at a first launch is not part of the graph
    tensors = device_tensors(first)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        launch(first, tensors, torch.cuda.current_stream().cuda_stream)
    for step in (first, second):
        fresh = device_tensors(step)
        for name, tensor in tensors.items():
            tensor.copy_(fresh[name])
        graph.replay()
        launch(step, fresh)
        torch.cuda.synchronize()
        for name in ("pool", "q_out", "k_out", "v_out"):
            assert torch.equal(tensors[name], fresh[name])


def test_the_rope_here_is_the_references(rng):
    """exact_rows is written out again above; the two must not drift apart."""
    step = make_step(saw(128, 128), MIXED, rng, dtype="bfloat16")
    exact, _ = exact_rows(step)
    rope = apply_rope(step.split()[1], step.cos_sin[step.position_ids.long()])
    torch.testing.assert_close(rotate(rope, 128).double(), exact, rtol=1e-5, atol=1e-4)


def test_tensors_of_torch_are_checked(rng):
    step = make_step(saw(128, 128), MIXED, rng)
    tensors = device_tensors(step)
    wide = torch.zeros(len(step.qkv), 2 * step.qkv.shape[1], dtype=torch.float16, device="cuda")
    shifted = torch.zeros(step.qkv.numel() + 8, dtype=torch.float16, device="cuda")[1:-7].view(step.qkv.shape)
    for bad, message in [
        (wide[:, ::2], "qkv is not contiguous"),
        (shifted, "qkv begins at address"),
        (tensors["qkv"].float(), "qkv has dtype float32"),
        (step.qkv, "qkv lies on the CPU"),
        (tensors["qkv"].clone().requires_grad_(), "qkv cannot be read through DLPack"),
    ]:
        with pytest.raises(OpError, match=message):
            launch(step, tensors | {"qkv": bad})
    assert tensors["q_out"].isnan().all()
    assert torch.equal(tensors["pool"].cpu(), step.pool)
