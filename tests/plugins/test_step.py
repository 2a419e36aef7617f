"""The TensorRT plugins on the GPU, through TensorRT's interfaces but without TensorRT: against the CPU reference."""

from __future__ import annotations

import pytest
import torch

from saw_trtllm.format import KVFormat
from tests.support.paged import V, dense_rows
from tests.support.plugin_layer import Layer
from tests.support.steps import CASES, DECODES, POOL, PREFILLS, Step, assert_matches, run_kernels
from tests.support.tolerance import attention_rounding

pytestmark = pytest.mark.gpu


def run(layer: Layer, step: Step, out: dict[str, torch.Tensor] | None = None) -> dict[str, torch.Tensor]:
    out = layer.tensors(step) if out is None else out
    layer.enqueue(step, out)
    assert layer.code == 0
    torch.cuda.synchronize()
    return {name: x.clone() for name, x in out.items()} | {"pool": step.gpu["pool"]}


@pytest.mark.parametrize(
    ("prefills", "decodes"), [(PREFILLS, DECODES), (PREFILLS, []), ([], DECODES)], ids=["mixed", "prefill", "decode"]
)
@pytest.mark.parametrize(("kv", "head_dim", "dtype", "options"), CASES)
def test_a_step_is_the_references(kv, head_dim, dtype, options, prefills, decodes, layer_of, plugin_driver, rng):
    if dtype == "bfloat16" and plugin_driver.TENSORRT[0] < 10:
        pytest.skip("TensorRT 8.6 has no bfloat16")
    step = Step.make(KVFormat(kv, head_dim, dtype=dtype), rng, prefills=prefills, decodes=decodes, **options)
    assert_matches(step, run(layer_of(step), step), step.reference())


def test_a_step_is_what_the_kernels_give(layer_of, rng):
    """The plugins add nothing: bits are those of the kernels called one by one, but for the splits of decodes."""
    step = Step.make(KVFormat("saw_int4", 128), rng, center=True)
    want = run_kernels(step)
    got = run(layer_of(step), step)
    for name in ("q", "k", "v", "pool"):
        assert torch.equal(got[name], want[name]), name
    first = int(step.gpu["last_token_ids"][step.num_prefills - 1])
    assert torch.equal(got["context"][:first], want["context"][:first])
    lengths = torch.tensor([history + new for history, new in step.sequences])
    values = dense_rows(got["pool"].cpu(), step.table, lengths, V, step.kv_format)[step.num_prefills :]
    decodes, expected = (x["context"][first:].cpu().double() for x in (got, want))
    largest = values.abs().amax((1, 2, 3))[:, None, None]
    assert ((decodes - expected).abs() <= 2 * attention_rounding(expected, torch.float16, largest)).all()


def test_padding_decodes_write_nothing_and_give_zeros(layer_of, rng):
    """How a batch is filled up to the size that a CUDA graph was captured for."""
    step = Step.make(KVFormat("saw_int4", 128), rng, prefills=[], decodes=DECODES, padding=3)
    got = run(layer_of(step), step)
    assert_matches(step, got, step.reference())
    assert (got["context"][step.num_tokens :] == 0).all()


def test_a_captured_graph_follows_the_lengths(layer_of, rng):
    """Host tensors are read once, when the graph is captured; lengths, tokens and tables at each replay."""
    fmt = KVFormat("saw_int4", 128)
    steps = [
        Step.make(fmt, rng, prefills=[], decodes=decodes)
        for decodes in (DECODES, [(500, 1), (2, 1), (31, 1), (64, 1), (130, 1)])
    ]
    first = steps[0]
    wide = max(steps, key=lambda s: s.gpu["kv_cache_block_offsets"].shape[-1])
    layer, out = layer_of(first), None
    fixed = Step.make(fmt, rng, prefills=[], decodes=DECODES)
    fixed.gpu["kv_cache_block_offsets"] = torch.full_like(wide.gpu["kv_cache_block_offsets"], -1)
    blocks = max(s.gpu["pool"].shape[0] for s in steps)
    fixed.gpu["pool"] = torch.zeros(blocks, *first.gpu["pool"].shape[1:], dtype=torch.uint8, device="cuda")
    fixed.host["host_kv_cache_pool_pointers"][POOL, 0] = fixed.gpu["pool"].data_ptr()
    fixed.gpu["kv_cache_block_offsets"][POOL, ..., : first.table.offsets.shape[-1]] = first.table.offsets.cuda()
    out = layer.tensors(fixed)
    run(layer, fixed, out)  # what is loaded at a first launch is not part of the graph
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        layer.enqueue(fixed, out)
    assert layer.code == 0
    fixed.host["host_request_types"][:] = -1  # nobody looks any more
    for step in (*steps, *steps):
        for name in ("qkv", "position_ids", "last_token_ids", "sequence_length", "rotary_cos_sin"):
            fixed.gpu[name].copy_(step.gpu[name])
        width = step.table.offsets.shape[-1]
        fixed.gpu["kv_cache_block_offsets"][POOL, ..., :width] = step.table.offsets.cuda()
        fixed.gpu["pool"][: len(step.pool)] = step.pool.cuda()
        out["workspace"].random_(256)
        out["decode_counters"].fill_(77)
        graph.replay()
        torch.cuda.synchronize()
        got = {name: x.clone() for name, x in out.items()} | {"pool": fixed.gpu["pool"][: len(step.pool)]}
        assert_matches(step, got, step.reference())


def test_one_layer_after_the_other_shares_a_workspace(layer_of, rng):
    step = Step.make(KVFormat("saw_int4", 128), rng, prefills=[], decodes=[(900, 1)] * 4)
    layer, want = layer_of(step), step.reference()
    out = layer.tensors(step)
    for _ in range(20):
        out["workspace"].random_(256)
        assert_matches(step, run(layer, step, out), want)


def test_host_tensors_in_gpu_memory(layer_of, plugin_driver, rng):
    """What TensorRT does when it times a plugin; an engine answers with an error instead of a crash."""
    step = Step.make(KVFormat("saw_int4", 128), rng)
    moved = torch.from_numpy(step.host["host_request_types"]).cuda()

    class OnGpu:
        shape = tuple(moved.shape)
        ctypes = type("ctypes", (), {"data": moved.data_ptr()})

    step.host["host_request_types"] = OnGpu
    timed = layer_of(step, run=False)
    out = timed.tensors(step)
    timed.enqueue(step, out)
    torch.cuda.synchronize()
    assert timed.code == 0
    assert out["context"].isnan().all()
    assert not plugin_driver.take_messages()
    layer = layer_of(step)
    layer.enqueue(step, out)
    torch.cuda.synchronize()
    assert layer.code != 0
    assert "input host_request_types is bound to GPU memory: bind a host address" in plugin_driver.take_messages()[-1]


def test_pinned_host_tensors(layer_of, rng):
    step = Step.make(KVFormat("saw_int4", 128), rng)
    pinned = {name: torch.from_numpy(x).pin_memory() for name, x in step.host.items()}
    step.host = {name: x.numpy() for name, x in pinned.items()}
    assert_matches(step, run(layer_of(step), step), step.reference())
