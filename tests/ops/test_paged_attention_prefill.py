"""prefill_attention against float64 attention on the dequantized history and the chunk's own keys and values."""

from __future__ import annotations

from dataclasses import dataclass, replace
from itertools import pairwise

import pytest
import torch

from saw_trtllm import ops
from saw_trtllm.format import KVFormat
from tests.support.exactness import assert_as_exact_as_plain
from tests.support.paged import LAYER, K, Table, V, dense_rows, poisoned_before, poisoned_pool

DTYPES = {"float16": torch.float16, "bfloat16": torch.bfloat16}
CACHES = ["saw_int4", "fp16", "saw_k8v4"]  # fp16: rows of the activations' own dtype
#: Tokens of history and of the chunk.
CHUNKS = [
    (0, 1),
    (0, 15),
    (0, 129),
    (1, 1),
    (17, 16),
    (0, 0),
    (63, 65),
    (64, 64),
    (65, 63),
    (4097, 33),
    (300, 0),
    (128, 300),
]


@dataclass
class Prefill:
    """A step of chunks on the GPU."""

    kv_format: KVFormat
    table: Table
    chunks: list[tuple[int, int]]
    q: torch.Tensor
    k: torch.Tensor
    v: torch.Tensor
    pool: torch.Tensor
    window: int | None = None
    softcap: float | None = None
    sinks: torch.Tensor | None = None
    softmax_scale: float | None = None

    @property
    def ends(self) -> torch.Tensor:
        return torch.tensor([chunk for _, chunk in self.chunks]).cumsum(0).int().cuda()

    @property
    def sequence_length(self) -> torch.Tensor:
        return torch.tensor([history + chunk for history, chunk in self.chunks], dtype=torch.int32, device="cuda")


def make_prefill(
    chunks,
    rng,
    *,
    head_dim=128,
    heads=(8, 2),
    dtype="float16",
    tokens_per_block=64,
    kv="saw_int4",
    padding=5,
    **options,
) -> Prefill:
    kv_format = KVFormat(kv, head_dim, dtype=dtype)
    num_heads, num_kv_heads = heads
    histories = [history for history, _ in chunks]
    table = Table.make(histories, tokens_per_block, rng)
    pool = poisoned_pool(kv_format, table, histories, num_kv_heads, tokens_per_block, rng)
    num_tokens = sum(chunk for _, chunk in chunks)

    def random(heads: int, spread: float) -> torch.Tensor:
        x = torch.randn(num_tokens + padding, heads, head_dim, generator=rng) * spread
        x[num_tokens:] = torch.nan  # tokens of no sequence
        return x.to(DTYPES[dtype]).cuda()

    return Prefill(
        kv_format,
        replace(table, offsets=table.offsets.cuda()),
        list(chunks),
        random(num_heads, 2.0),
        random(num_kv_heads, 1.0),
        random(num_kv_heads, 1.0),
        pool.cuda(),
        **options,
    )


def launch(step: Prefill, out: torch.Tensor, ends: torch.Tensor, sequence_length: torch.Tensor) -> None:
    ops.prefill_attention(
        step.q,
        step.k,
        step.v,
        ends,
        sequence_length,
        step.pool,
        step.table.offsets,
        kv_format=step.kv_format,
        layer=LAYER,
        out=out,
        softmax_scale=step.softmax_scale,
        window=step.window,
        softcap=step.softcap,
        sinks=step.sinks,
        stream=torch.cuda.current_stream(),
    )


def run(step: Prefill) -> torch.Tensor:
    out = torch.full_like(step.q, torch.nan)
    launch(step, out, step.ends, step.sequence_length)
    torch.cuda.synchronize()
    return out


def attend(step: Prefill, s: int, dtype: torch.dtype) -> torch.Tensor:
    """Plain PyTorch attention of sequence s in ``dtype``, float64 ``[chunk, num_heads, head_dim]``."""
    history, chunk = step.chunks[s]
    end = int(step.ends[s])
    mine = slice(end - chunk, end)
    lengths = torch.tensor([history], device="cuda")
    table = replace(step.table, blocks=step.table.blocks[s : s + 1])

    def values(own: torch.Tensor, which: int) -> torch.Tensor:
        past = dense_rows(step.pool, table, lengths, which, step.kv_format)[0, :, :history]
        return torch.cat([past, own[mine].double().transpose(0, 1)], dim=1).to(dtype)

    k, v = values(step.k, K), values(step.v, V)
    q = step.q[mine].to(dtype).unflatten(1, (len(k), -1)).permute(1, 2, 0, 3)  # [num_kv_heads, group, chunk, head_dim]
    inner = torch.float64 if dtype == torch.float64 else torch.float32
    scores = (q @ k[:, None].transpose(-1, -2)).to(inner) * (step.softmax_scale or step.kv_format.head_dim**-0.5)
    if step.softcap is not None:
        scores = step.softcap * torch.tanh(scores / step.softcap)
    key = torch.arange(history + chunk, device="cuda")
    query = key[history:, None]
    hidden = key > query
    if step.window is not None:
        hidden |= key <= query - step.window
    scores = scores.masked_fill(hidden, -torch.inf)
    if step.sinks is not None:
        sinks = step.sinks.to(inner).view(len(k), -1, 1, 1).expand(*scores.shape[:-1], 1)
        scores = torch.cat([scores, sinks], dim=-1)
    probs = scores.softmax(-1)[..., : history + chunk]
    out = (probs.to(dtype) @ v[:, None]).permute(2, 0, 1, 3).flatten(1, 2)
    return out if dtype == torch.float64 else out.to(step.q.dtype).double()


def assert_accurate(step: Prefill, out: torch.Tensor) -> None:
    end = 0
    for s, (_, chunk) in enumerate(step.chunks):
        begin, end = end, end + chunk
        if chunk:
            exact, plain = (attend(step, s, dtype).flatten(0, 1)[None] for dtype in (torch.float64, step.q.dtype))
            assert_as_exact_as_plain(out[begin:end].flatten(0, 1)[None], exact, plain)
    assert out[end:].isnan().all()


def check(step: Prefill) -> torch.Tensor:
    before = step.pool.clone()
    out = run(step)
    assert_accurate(step, out)
    assert torch.equal(step.pool, before)
    return out


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kv", CACHES)
@pytest.mark.parametrize("head_dim", [64, 96, 128, 256])
def test_chunks(head_dim, kv, dtype, rng):
    check(make_prefill(CHUNKS, rng, head_dim=head_dim, kv=kv, dtype=dtype))


@pytest.mark.parametrize("head_dim", [64, 256])
@pytest.mark.parametrize(
    "heads", [(1, 1), (3, 3), (4, 2), (6, 2), (10, 2), (14, 2), (16, 2), (18, 2), (22, 2), (32, 2), (16, 1)]
)
def test_groups(heads, head_dim, rng):
    check(make_prefill([(0, 1), (65, 300), (700, 130)], rng, heads=heads, head_dim=head_dim))


@pytest.mark.parametrize("kv", CACHES)
@pytest.mark.parametrize("tokens_per_block", [16, 32, 64, 128])
@pytest.mark.parametrize("head_dim", [64, 96, 128, 256])
def test_blocks(tokens_per_block, head_dim, kv, rng):
    n = tokens_per_block
    chunks = [(1, 5), (n - 1, 1), (n, n), (n + 1, 7), (1000, 129), (0, n), (129, 0)]
    check(make_prefill(chunks, rng, head_dim=head_dim, tokens_per_block=n, kv=kv))


@pytest.mark.parametrize("kv", CACHES)
@pytest.mark.parametrize(("history", "chunk"), [(0, 4096), (8192, 512), (70000, 1), (1000, 1500)])
def test_long(history, chunk, kv, rng):
    check(make_prefill([(history, chunk)], rng, kv=kv, dtype="bfloat16"))


@pytest.mark.parametrize("num_sequences", [2, 31, 33, 600, 1024])
def test_ragged_batches(num_sequences, rng):
    sizes = torch.randint(0, 90, (num_sequences, 2), generator=rng).tolist()
    check(make_prefill([tuple(x) for x in sizes], rng, tokens_per_block=16))


@pytest.mark.parametrize("kv", CACHES)
@pytest.mark.parametrize("window", [1, 16, 63, 64, 65, 200, 5000])
def test_window(window, kv, rng):
    check(make_prefill(CHUNKS, rng, window=window, kv=kv))


@pytest.mark.parametrize("kv", CACHES)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("head_dim", [64, 96, 128, 256])
@pytest.mark.parametrize("window", [1, 65, 200])
def test_what_lies_before_a_window_is_no_matter(window, head_dim, dtype, kv, rng):
    """A block that a window has left may be another sequence's, and hold NaN."""
    step = make_prefill(CHUNKS, rng, head_dim=head_dim, dtype=dtype, tokens_per_block=16, window=window, kv=kv)
    firsts = [history - window + 1 for history, _ in CHUNKS]
    other = replace(step, pool=poisoned_before(step.pool, step.table, firsts, step.kv_format))
    num_tokens = sum(chunk for _, chunk in CHUNKS)
    assert torch.equal(run(other)[:num_tokens], check(step)[:num_tokens])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("softcap", [1.0, 30.0])
def test_softcap(softcap, dtype, rng):
    check(make_prefill(CHUNKS, rng, softcap=softcap, dtype=dtype))


def test_sinks(rng):
    step = make_prefill(CHUNKS, rng)
    with_sinks = check(replace(step, sinks=torch.linspace(-4.0, 9.0, step.q.shape[1], device="cuda")))
    assert not torch.equal(with_sinks[:1], run(step)[:1])


def test_everything_at_once(rng):
    options = {"window": 100, "softcap": 20.0, "softmax_scale": 0.05}
    step = make_prefill(CHUNKS, rng, heads=(10, 2), dtype="bfloat16", tokens_per_block=32, **options)
    check(replace(step, sinks=torch.linspace(-2.0, 2.0, 10, device="cuda")))


@pytest.mark.parametrize("spread", [1e-3, 60.0])
@pytest.mark.parametrize("dtype", DTYPES)
def test_scores_of_any_size(spread, dtype, rng):
    step = make_prefill(CHUNKS, rng, dtype=dtype)
    check(replace(step, q=step.q * spread))


@pytest.mark.parametrize("kv", CACHES)
def test_what_another_sequence_holds_is_no_matter(kv, rng):
    """Not even NaN: the tile that ends in a chunk begins the next one."""
    step = make_prefill([(70, 50), (0, 30), (10, 200)], rng, kv=kv)
    before = run(step)
    for x in (step.q, step.k, step.v):
        x[50:80] = torch.nan
    after = run(step)
    assert torch.equal(after[:50], before[:50])
    assert torch.equal(after[80:280], before[80:280])


@pytest.mark.parametrize("kv", CACHES)
def test_two_runs_are_the_same_to_the_bit_and_so_is_each_sequence_alone(kv, rng):
    step = make_prefill([(500, 300), (0, 700), (4097, 33)], rng, kv=kv, padding=0)
    first = run(step)
    assert torch.equal(run(step), first)
    for s, (begin, end) in enumerate(pairwise([0, *step.ends.tolist()])):
        alone = replace(
            step,
            chunks=step.chunks[s : s + 1],
            q=step.q[begin:end],
            k=step.k[begin:end],
            v=step.v[begin:end],
            table=replace(step.table, offsets=step.table.offsets[s : s + 1], blocks=step.table.blocks[s : s + 1]),
        )
        assert torch.equal(run(alone), first[begin:end])


def test_graph_replays_see_new_lengths(rng):
    step = make_prefill([(0, 200), (700, 64), (64, 100)], rng, heads=(16, 4))
    run(step)
    out, ends, lengths = torch.full_like(step.q, torch.nan), step.ends, step.sequence_length
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        launch(step, out, ends, lengths)
    for chunks in ([(0, 200), (700, 64), (64, 100)], [(0, 1), (33, 300), (1, 0)], [(0, 0), (0, 300), (20, 64)]):
        step = replace(step, chunks=chunks)
        ends.copy_(step.ends)
        lengths.copy_(step.sequence_length)
        out.fill_(torch.nan)
        graph.replay()
        torch.cuda.synchronize()
        assert_accurate(step, out)
