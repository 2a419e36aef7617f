"""rotate_quantize_kv against the CPU reference: every byte of the pool, and the rotated Q, K and V."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from saw_trtllm.backends.reference.int4 import rotate
from saw_trtllm.backends.reference.rotate_quantize_kv import apply_rope, rope_angles
from saw_trtllm.errors import OpError
from saw_trtllm.format import ROW_TAIL_BYTES, KVFormat, hadamard_orders
from tests.support.paged import LAYER
from tests.support.tolerance import rotated_rounding, stored_rounding
from tests.support.write_step import (
    DTYPES,
    LARGE,
    LONG,
    MIXED,
    assert_close_outputs,
    check,
    device_tensors,
    exact_rows,
    launch,
    make_step,
    reference,
    run,
    saw,
    token_order,
    written_rows,
)

ALL_ORDERS = [(d, o) for d in (64, 96, 128, 256) for o in (1, *hadamard_orders(d))]


@pytest.mark.parametrize("sequences", [MIXED, LARGE], ids=["small", "large"])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("head_dim", "order"), ALL_ORDERS)
def test_rows_are_the_references(head_dim, order, dtype, sequences, rng):
    check(make_step(saw(head_dim, order), sequences, rng, dtype=dtype))


@pytest.mark.parametrize("sequences", [MIXED[3:], MIXED, LARGE, LONG], ids=["few", "small", "large", "long"])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("head_dim", [64, 96, 128, 256])
def test_keys_of_8_bits(head_dim, dtype, sequences, rng):
    kv_format = KVFormat("saw_k8v4", head_dim, range_factor=0.9)
    check(make_step(kv_format, sequences, rng, dtype=dtype, center=dtype == "bfloat16", heads=(9, 3)))


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
    rounding = rotated_rounding(step.kv_format.hadamard_order, exact.abs().amax(-1))
    assert ((scale - expected).abs() <= stored_rounding(expected, torch.float16, 2 / 15 * rounding)).all()


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
    rope = apply_rope(step.split()[1], *rope_angles(step.cos_sin[step.position_ids.long()]))
    bound = rotated_rounding(128, exact.abs().amax(-1, keepdim=True))
    assert ((rotate(rope, 128).double() - exact).abs() <= bound).all()


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
