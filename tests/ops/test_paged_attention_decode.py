"""decode_attention against float64 attention on the dequantized rows."""

from __future__ import annotations

from dataclasses import dataclass, replace

import pytest
import torch

from saw_trtllm import ops
from saw_trtllm.format import KVFormat
from tests.support.exactness import assert_as_exact_as_plain
from tests.support.paged import LAYER, K, Table, V, dense_rows, poisoned_before, poisoned_pool
from tests.support.tolerance import attention_rounding

DTYPES = {"float16": torch.float16, "bfloat16": torch.bfloat16}
CACHES = ["saw_int4", "fp16", "saw_k8v4"]  # fp16: rows of the activations' own dtype
LENGTHS = [0, 1, 15, 16, 17, 63, 64, 65, 4097]


@dataclass
class Decode:
    """A decode step on the GPU."""

    kv_format: KVFormat
    table: Table
    q: torch.Tensor
    sequence_length: torch.Tensor
    pool: torch.Tensor
    window: int | None = None
    softcap: float | None = None
    sinks: torch.Tensor | None = None
    softmax_scale: float | None = None

    @property
    def scale(self) -> float:
        return self.softmax_scale or self.kv_format.head_dim**-0.5


def make_decode(
    lengths, rng, *, head_dim=128, heads=(8, 2), dtype="float16", tokens_per_block=64, kv="saw_int4", **options
) -> Decode:
    kv_format = KVFormat(kv, head_dim, dtype=dtype)
    num_heads, num_kv_heads = heads
    table = Table.make(lengths, tokens_per_block, rng)
    pool = poisoned_pool(kv_format, table, lengths, num_kv_heads, tokens_per_block, rng)
    q = torch.randn(len(lengths), num_heads, head_dim, generator=rng) * 2
    return Decode(
        kv_format,
        replace(table, offsets=table.offsets.cuda()),
        q.to(DTYPES[dtype]).cuda(),
        torch.tensor(lengths, dtype=torch.int32, device="cuda"),
        pool.cuda(),
        **options,
    )


def make_workspace(step: Decode) -> torch.Tensor:
    num_sequences, num_heads, head_dim = step.q.shape
    size = ops.decode_workspace_bytes(num_sequences, num_heads, step.pool.shape[-3], head_dim)
    return torch.zeros(size, dtype=torch.uint8, device="cuda")


def launch(step: Decode, out: torch.Tensor, workspace: torch.Tensor) -> None:
    ops.decode_attention(
        step.q,
        step.sequence_length,
        step.pool,
        step.table.offsets,
        kv_format=step.kv_format,
        layer=LAYER,
        out=out,
        workspace=workspace,
        softmax_scale=step.softmax_scale,
        window=step.window,
        softcap=step.softcap,
        sinks=step.sinks,
        stream=torch.cuda.current_stream(),
    )


def run(step: Decode, workspace: torch.Tensor | None = None) -> torch.Tensor:
    out = torch.full_like(step.q, torch.nan)
    launch(step, out, make_workspace(step) if workspace is None else workspace)
    torch.cuda.synchronize()
    return out


def attend(step: Decode, dtype: torch.dtype) -> torch.Tensor:
    """Plain PyTorch attention in ``dtype`` on the dequantized rows, float64 ``[num_sequences, num_heads, head_dim]``.

    In a 16-bit dtype operands and products are rounded to it and the softmax is in fp32, as a model would do it.
    """
    lengths = step.sequence_length.long()
    keys, values = (dense_rows(step.pool, step.table, lengths, which, step.kv_format).to(dtype) for which in (K, V))
    q = step.q.to(dtype).unflatten(1, (keys.shape[1], -1))
    inner = torch.float64 if dtype == torch.float64 else torch.float32
    scores = (q @ keys.transpose(-1, -2)).to(inner) * step.scale
    if step.softcap is not None:
        scores = step.softcap * torch.tanh(scores / step.softcap)
    position = torch.arange(keys.shape[2], device="cuda")
    hidden = position >= lengths[:, None]
    if step.window is not None:
        hidden |= position < lengths[:, None] - step.window
    scores = scores.masked_fill(hidden[:, None, None], -torch.inf)
    if step.sinks is not None:
        sinks = step.sinks.to(inner).view(1, keys.shape[1], -1, 1).expand(*scores.shape[:-1], 1)
        scores = torch.cat([scores, sinks], dim=-1)
    probs = scores.softmax(-1)[..., : len(position)].nan_to_num(0.0)
    out = probs.to(dtype) @ values
    return out.flatten(1, 2).to(step.q.dtype).double() if dtype != torch.float64 else out.flatten(1, 2)


def assert_accurate(step: Decode, out: torch.Tensor) -> None:
    """As exact as the 16-bit computation, each sequence by itself; zeros for those without tokens."""
    used = step.sequence_length > 0
    assert (out[~used] == 0).all()
    exact, plain = (attend(step, dtype)[used] for dtype in (torch.float64, step.q.dtype))
    assert_as_exact_as_plain(out[used], exact, plain)


def check(step: Decode) -> torch.Tensor:
    before = step.pool.clone()
    out = run(step)
    assert_accurate(step, out)
    assert torch.equal(step.pool, before)
    return out


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kv", [*CACHES, "int4"])
@pytest.mark.parametrize("head_dim", [64, 96, 128, 256])
def test_lengths(head_dim, kv, dtype, rng):
    check(make_decode(LENGTHS, rng, head_dim=head_dim, kv=kv, dtype=dtype))


@pytest.mark.parametrize("kv", CACHES)
@pytest.mark.parametrize("head_dim", [64, 96, 128, 256])
@pytest.mark.parametrize(
    "heads", [(1, 1), (3, 3), (4, 2), (6, 2), (8, 2), (10, 2), (14, 2), (16, 2), (18, 2), (22, 2), (32, 2), (16, 1)]
)
def test_groups(heads, head_dim, kv, rng):
    check(make_decode([1, 65, 700, 130], rng, heads=heads, head_dim=head_dim, kv=kv))


@pytest.mark.parametrize("kv", CACHES)
@pytest.mark.parametrize("tokens_per_block", [16, 32, 64, 128])
@pytest.mark.parametrize("head_dim", [64, 96, 128, 256])
def test_blocks(tokens_per_block, head_dim, kv, rng):
    lengths = [1, tokens_per_block - 1, tokens_per_block, tokens_per_block + 1, 1000, 0, 129]
    check(make_decode(lengths, rng, head_dim=head_dim, tokens_per_block=tokens_per_block, kv=kv))


@pytest.mark.parametrize("kv", CACHES)
@pytest.mark.parametrize("length", [1, 64, 65, 4097, 70000])
def test_one_long_sequence(length, kv, rng):
    check(make_decode([length], rng, heads=(32, 8), kv=kv))


@pytest.mark.parametrize(
    ("heads", "head_dim"), [((32, 8), 128), ((16, 1), 128), ((8, 8), 64), ((8, 2), 96), ((8, 2), 256)]
)
@pytest.mark.parametrize(
    "lengths", [[70000], [20000, 5, 9000], [4096] * 8, [1500] * 5 + [0], [0, 30000, 0], [300] * 3, [3000] * 17]
)
@pytest.mark.parametrize("kv", ["saw_int4", "saw_k8v4"])
def test_few_sequences(kv, lengths, heads, head_dim, rng):
    """Sums of one cluster, of several, and of clusters beside single CTAs."""
    step = make_decode(lengths, rng, heads=heads, head_dim=head_dim, kv=kv)
    workspace = make_workspace(step)
    out = run(step, workspace)
    assert_accurate(step, out)
    assert torch.equal(run(step, workspace), out)


@pytest.mark.parametrize("kv", CACHES)
def test_one_long_sequence_of_one_wide_head(kv, rng):
    """The most partial sums that a sequence can have: one of every CTA."""
    check(make_decode([40000], rng, heads=(16, 1), head_dim=256, kv=kv))


@pytest.mark.parametrize("kv", CACHES)
@pytest.mark.parametrize("num_sequences", [1, 2, 3, 127, 129, 600, 1024])
@pytest.mark.parametrize("tokens_per_block", [16, 64])
def test_ragged_batches(num_sequences, tokens_per_block, kv, rng):
    lengths = torch.randint(0, 300, (num_sequences,), generator=rng).tolist()
    check(make_decode(lengths, rng, tokens_per_block=tokens_per_block, kv=kv))


def test_one_long_among_many_short(rng):
    check(make_decode([3] * 100 + [9000] + [20] * 60, rng, heads=(8, 4), dtype="bfloat16"))


def test_all_sequences_empty(rng):
    check(make_decode([0, 0, 0], rng))


@pytest.mark.parametrize("kv", CACHES)
@pytest.mark.parametrize("window", [1, 16, 63, 64, 65, 200, 5000])
@pytest.mark.parametrize("tokens_per_block", [16, 128])
def test_window(window, tokens_per_block, kv, rng):
    check(make_decode(LENGTHS, rng, tokens_per_block=tokens_per_block, window=window, kv=kv))


@pytest.mark.parametrize("kv", CACHES)
@pytest.mark.parametrize("head_dim", [64, 256])
@pytest.mark.parametrize("window", [1, 16, 65, 200])
def test_what_lies_before_a_window_is_no_matter(window, head_dim, kv, rng):
    """A block that a window has left may be another sequence's, and hold NaN."""
    step = make_decode(LENGTHS, rng, head_dim=head_dim, tokens_per_block=16, window=window, kv=kv)
    firsts = [length - window for length in LENGTHS]
    other = replace(step, pool=poisoned_before(step.pool, step.table, firsts, step.kv_format))
    assert torch.equal(run(other), run(step))


@pytest.mark.parametrize("kv", CACHES)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("softcap", [1.0, 30.0])
def test_softcap(softcap, dtype, kv, rng):
    check(make_decode(LENGTHS, rng, softcap=softcap, dtype=dtype, kv=kv))


@pytest.mark.parametrize("kv", CACHES)
@pytest.mark.parametrize("head_dim", [64, 128])
def test_sinks(head_dim, kv, rng):
    step = make_decode(LENGTHS, rng, head_dim=head_dim, kv=kv)
    sinks = torch.linspace(-4.0, 9.0, step.q.shape[1], device="cuda")
    with_sinks = check(replace(step, sinks=sinks))
    assert not torch.equal(with_sinks, run(step))


@pytest.mark.parametrize("kv", CACHES)
def test_everything_at_once(kv, rng):
    options = {"window": 100, "softcap": 20.0, "softmax_scale": 0.05, "kv": kv}
    step = make_decode(LENGTHS, rng, heads=(10, 2), dtype="bfloat16", tokens_per_block=32, **options)
    check(replace(step, sinks=torch.linspace(-2.0, 2.0, 10, device="cuda")))


@pytest.mark.parametrize("kv", CACHES)
@pytest.mark.parametrize("spread", [1e-3, 300.0])
def test_scores_of_any_size(spread, kv, rng):
    """Flat and very peaked softmaxes: the running maximum moves often, or never."""
    step = make_decode(LENGTHS, rng, kv=kv)
    check(replace(step, q=step.q * spread))


@pytest.mark.parametrize("kv", CACHES)
@pytest.mark.parametrize("lengths", [LENGTHS, [4097], [70] * 300], ids=["mixed", "one", "many"])
def test_two_runs_are_the_same_to_the_bit(lengths, kv, rng):
    step = make_decode(lengths, rng, kv=kv)
    workspace = make_workspace(step)
    first = run(step, workspace)
    for _ in range(3):
        assert torch.equal(run(step, workspace), first)


def test_launches_may_share_a_workspace_in_turn(rng):
    """Batches, lengths and caches change from step to step; what one launch leaves there never reaches another."""
    steps = [
        make_decode(lengths, rng, heads=(8, 2), kv=kv)
        for kv in CACHES
        for lengths in ([4097, 3], [9000], [700] * 20, [1, 0, 65])
    ]
    workspace = max((make_workspace(step) for step in steps), key=len)
    for _ in range(2):
        for step in steps:
            assert torch.equal(run(step, workspace), run(step))


def test_a_sequence_does_not_depend_on_its_batch_by_much(rng):
    """Splits differ with the batch, so bits may; values may not."""
    step = make_decode([500, 4097, 33], rng)
    together = run(step)
    values = dense_rows(step.pool, step.table, step.sequence_length.long(), V, step.kv_format)
    limits = 2 * attention_rounding(together, together.dtype, values.abs().amax((1, 2, 3))[:, None, None])
    for s in range(3):
        alone = replace(
            step,
            q=step.q[s : s + 1],
            sequence_length=step.sequence_length[s : s + 1],
            table=replace(step.table, offsets=step.table.offsets[s : s + 1], blocks=step.table.blocks[s : s + 1]),
        )
        assert ((run(alone)[0].double() - together[s].double()).abs() <= limits[s]).all()


def test_graph_replays_see_new_lengths(rng):
    step = make_decode([700, 4097, 64, 1, 300], rng, heads=(16, 4))
    run(step)  # what is set up at a first launch is not part of the graph
    workspace, out = make_workspace(step), torch.full_like(step.q, torch.nan)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        launch(step, out, workspace)
    for lengths in ([700, 4097, 64, 1, 300], [1, 2, 3, 0, 300], [65, 4000, 0, 1, 17]):
        step.sequence_length.copy_(torch.tensor(lengths))
        graph.replay()
        torch.cuda.synchronize()
        assert torch.equal(out, run(step))
        assert_accurate(step, out)
