"""rotate_quantize_kv with frames: the product's rows, their codes, and scores that stay as they are."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from saw_trtllm.format import KVFormat
from tests.support.paged import LAYER
from tests.support.write_step import (
    DTYPES,
    LARGE,
    LONG,
    MIXED,
    Step,
    assert_close_outputs,
    assert_pool,
    device_tensors,
    exact_queries_and_keys,
    frame_error,
    framed,
    launch,
    make_step,
    reference,
    run,
    saw,
    written_rows,
)

#: Prefills, chunks after a history and decodes; a tile has 32 rows.
SEQUENCES = {"one": [(700, 1)], "mixed": MIXED, "large": LARGE, "long": LONG}


def check(step: Step) -> None:
    got, want = run(step), reference(step)
    assert_queries_and_keys(step, got)
    if step.kv_format.rotate_v:
        assert_close_outputs(got["v_out"], want["v_out"])
    else:
        assert torch.equal(got["v_out"], step.split()[2])
    assert_pool(step, got["pool"], want["pool"])


def assert_queries_and_keys(step: Step, got: dict[str, torch.Tensor]) -> None:
    """Q and K are the exact rows rounded once, but for the error of their products."""
    exact = dict(
        zip(("k_out", "q_out"), zip(exact_queries_and_keys(step)[::-1], step.frames, strict=True), strict=True)
    )
    for name, (x, frame) in exact.items():
        y, error = framed(x, frame), frame_error(step.kv_format.head_dim)
        limit = torch.finfo(got[name].dtype).eps / 2 * y.abs() * 1.01 + 6e-8
        if name == "q_out" and got[name].dtype == torch.bfloat16:
            # Of x and of the matrix, each rounded to fp16, whose least number is 2^-24.
            error += 2 * 2.0**-11
            limit += 2.0**-25 * framed(torch.ones_like(x), frame.abs())
        limit += error * framed(x.abs(), frame.abs())
        assert got[name].isfinite().all()
        assert ((got[name].double() - y).abs() <= limit).all(), name


@pytest.mark.parametrize("sequences", SEQUENCES)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("head_dim", [64, 96, 128, 256])
@pytest.mark.parametrize("kv", ["saw_int4", "saw_k8v4"])
def test_codes_are_the_references(kv, head_dim, dtype, sequences, rng):
    kv_format = KVFormat(kv, head_dim, rotate_v=False, range_factor=0.9)
    check(make_step(kv_format, SEQUENCES[sequences], rng, dtype=dtype, frames=True, center=True))


@pytest.mark.parametrize(("head_dim", "heads"), [(64, (64, 8)), (256, (16, 4))])
def test_a_cta_works_on_tile_after_tile(head_dim, heads, rng):
    """More tiles than eight for each place of a CTA: those of head_dim 256 are of the kernel for few tokens."""
    kv_format = KVFormat("saw_int4", head_dim, rotate_v=False)
    check(make_step(kv_format, LONG, rng, dtype="bfloat16", heads=heads, frames=True, center=True))


@pytest.mark.parametrize("heads", [(1, 1), (4, 1), (7, 7), (12, 4), (15, 3), (32, 8), (16, 1)])
def test_groups(heads, rng):
    check(make_step(KVFormat("saw_int4", 128, rotate_v=False), MIXED, rng, heads=heads, frames=True))


@pytest.mark.parametrize("order", [16, 32, 64, 128, 256])
def test_v_is_rotated_beside_them(order, rng):
    step = make_step(saw(max(order, 64), order), MIXED, rng, dtype="bfloat16", frames=True)
    assert step.kv_format.rotate_v
    check(step)


def test_plain_int4_takes_frames(rng):
    check(make_step(saw(64, 1), MIXED, rng, tokens_per_block=16, frames=True))


@pytest.mark.parametrize("head_dim", [64, 96, 128, 256])
def test_a_hadamard_matrix_is_a_frame(head_dim, rng):
    """With the rotation as its frame, a step is what it is without one, up to the products' rounding."""
    plain = make_step(KVFormat("saw_int4", head_dim, rotate_v=False), MIXED, rng)
    order = plain.kv_format.hadamard_order
    block = torch.tensor([[(-1) ** (i & j).bit_count() for j in range(order)] for i in range(order)]) / order**0.5
    matrix = torch.block_diag(*[block] * (head_dim // order)).expand(2, -1, -1).contiguous()
    check(replace(plain, frames=(matrix, matrix)))
    plain_run, framed_run = (run(step) for step in (plain, replace(plain, frames=(matrix, matrix))))
    for name in ("q_out", "k_out", "v_out"):
        assert_close_outputs(framed_run[name], plain_run[name])


def test_scores_stay(rng):
    """q'k' is qk: what is left is the rounding of both to 16 bits."""
    step = make_step(KVFormat("saw_int4", 128, rotate_v=False), [(0, 200)], rng, frames=True, center=True)
    got = run(step)
    q, k = (got[name].double().unflatten(1, (2, -1)) for name in ("q_out", "k_out"))
    exact_q, exact_k = (x.unflatten(1, (2, -1)) for x in exact_queries_and_keys(step))

    def scores(q: torch.Tensor, k: torch.Tensor) -> torch.Tensor:
        return torch.einsum("nhgd,mhd->hgnm", q, k[:, :, 0])

    error = (scores(q, k) - scores(exact_q, exact_k)).abs()
    # The frames are rounded to fp32, and one is the other's inverse only so far.
    drift = 128 * 2.0**-24 * 30 * scores(exact_q.abs(), exact_k.abs())
    assert (error <= 1.01 * torch.finfo(torch.float16).eps * scores(q.abs(), k.abs()) + drift).all()


@pytest.mark.parametrize("sequences", [MIXED, LONG], ids=["small", "long"])
def test_tokens_of_no_sequence_are_not_stored_and_spoil_nothing(sequences, rng):
    whole = make_step(KVFormat("saw_int4", 128, rotate_v=False), sequences, rng, frames=True)
    want = run(whole)
    cut = replace(
        whole,
        qkv=whole.qkv.clone(),
        last_token_ids=whole.last_token_ids[:-2],
        sequence_length=whole.sequence_length[:-2],
        table=replace(whole.table, offsets=whole.table.offsets[:-2]),
    )
    tokens = int(cut.last_token_ids[-1])
    cut.qkv[tokens:] = torch.nan
    got, written = run(cut), written_rows(cut)
    rows, before, full = (x[:, LAYER].permute(0, 3, 1, 2, 4) for x in (got["pool"], whole.pool, want["pool"]))
    assert torch.equal(rows[~written], before[~written])
    assert torch.equal(rows[written], full[written])
    for name in ("q_out", "k_out", "v_out"):
        assert torch.equal(got[name][:tokens], want[name][:tokens])


def test_without_current_rows_the_pool_is_the_same(rng):
    step = make_step(saw(128, 128), LARGE, rng, frames=True)
    assert torch.equal(run(step)["pool"], run(step, current=False)["pool"])


def test_graph_replays_see_new_inputs(rng):
    first, second = (make_step(saw(128, 128), MIXED, rng, frames=True) for _ in range(2))
    second = replace(second, frames=first.frames, table=first.table)
    tensors = device_tensors(first)
    launch(first, tensors)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        launch(first, tensors, torch.cuda.current_stream().cuda_stream)
    fresh = device_tensors(second)
    for name, tensor in tensors.items():
        tensor.copy_(fresh[name])
    graph.replay()
    launch(second, fresh)
    torch.cuda.synchronize()
    for name in ("pool", "q_out", "k_out", "v_out"):
        assert torch.equal(tensors[name], fresh[name])


@pytest.mark.parametrize("size", [1e-4, 300])
def test_large_and_small_rows(size, rng):
    """fp16's range is that of the parts: rows down to its least scales and up to its largest numbers stay whole."""
    step = make_step(
        KVFormat("saw_int4", 128, rotate_v=False), LARGE, rng, dtype="bfloat16", frames=True, outliers=False
    )
    check(replace(step, qkv=(step.qkv.float() * size).to(step.qkv.dtype)))
