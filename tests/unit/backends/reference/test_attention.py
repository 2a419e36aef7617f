"""The reference's two operations against plain softmax attention in float64 on rows decoded from the pool's bytes."""

import dataclasses
import random

import numpy as np
import pytest
import torch

from saw_trtllm.backends.reference.cache import PagedPool, StepPlan
from saw_trtllm.backends.reference.paged_attention import paged_attention
from saw_trtllm.backends.reference.rotate_quantize_kv import rotate_quantize_kv
from saw_trtllm.engine.step import DECODE, PREFILL, StepInputs, StepSequence
from saw_trtllm.format import KVFormat
from tests.support.tolerance import EPS, chain_rounding

NUM_LAYERS, LAYER = 3, 1
NUM_BLOCKS = 40
LENGTHS = (1, 15, 16, 17, 63, 64, 65)
DTYPES = {"float16": np.float16, "float32": np.float32}


def block_diagonal(head_dim, order):
    h = np.ones((1, 1))
    while len(h) < order:
        h = np.block([[h, h], [h, -h]])
    return np.kron(np.eye(head_dim // order), h / np.sqrt(order))


class World:
    """A poisoned pool, sequences of random tokens in shuffled blocks, and the oracle's view of both."""

    def __init__(
        self,
        kv="saw_int4",
        order=None,
        head_dim=64,
        heads=(4, 2),
        tokens_per_block=16,
        lengths=LENGTHS,
        dtype="float32",
        poison=0xFF,
        rotate_v=False,
        seed=0,
    ):
        rng, generator = random.Random(seed), torch.Generator().manual_seed(seed)
        self.format = KVFormat(kv, head_dim, dtype, order)
        self.basis = block_diagonal(head_dim, self.format.hadamard_order)
        self.rotate_v, self.poison, self.tokens_per_block = rotate_v, poison, tokens_per_block
        self.pool = PagedPool(self.format, NUM_BLOCKS, NUM_LAYERS, heads[1], tokens_per_block)
        self.pool.data.fill_(poison)
        free = rng.sample(range(NUM_BLOCKS), NUM_BLOCKS)
        self.tables = [[free.pop() for _ in range(-(-n // tokens_per_block))] for n in lengths]
        self.lengths = lengths
        torch_dtype = getattr(torch, dtype)
        self.qkv = [
            [torch.randn(n, h, head_dim, generator=generator).to(torch_dtype) for h in (heads[0], heads[1], heads[1])]
            for n in lengths
        ]
        angle = torch.randn(max(lengths), head_dim // 2, generator=generator)
        self.cos_sin = torch.stack([angle.cos(), angle.sin()], dim=-1)

    def run(self, parts, garbage=False, k_center=None, frames=(None, None), **options):
        """Compute ``(sequence, start, count, kind)`` parts in one step: the outputs by part, in float64."""
        sequences = [StepSequence([0] * n, start, self.lengths[s], kind, self.tables[s]) for s, start, n, kind in parts]
        inputs = StepInputs.pack(sequences, NUM_LAYERS)
        if garbage:
            inputs = with_garbage(inputs, [len(self.tables[s]) for s, *_ in parts])
        plan = StepPlan.make(inputs, self.pool)
        q, k, v = (torch.cat([self.qkv[s][i][a : a + n] for s, a, n, _ in parts]) for i in range(3))
        levers = {"rotate_v": self.rotate_v, "k_center": k_center, "k_frame": frames[0], "q_frame": frames[1]}
        rotated = rotate_quantize_kv(q, k, v, self.cos_sin, self.pool, LAYER, plan, **levers)
        out = paged_attention(*rotated, self.pool, LAYER, plan, **options)
        assert out.dtype == q.dtype
        return [o.double().numpy() for o in out.split([n for _, _, n, _ in parts])]

    def fill(self, ends):
        """Prefill the first ``ends[s]`` tokens of each sequence."""
        self.run([(s, 0, n, PREFILL) for s, n in enumerate(ends) if n])

    def check_only_own_rows_changed(self, before, parts):
        own = torch.zeros(NUM_BLOCKS, self.tokens_per_block, dtype=torch.bool)
        for s, start, count, _ in parts:
            for t in range(start, start + count):
                own[self.tables[s][t // self.tokens_per_block], t % self.tokens_per_block] = True
        changed = (self.pool.data != before).any(-1)
        assert not changed[:, [i for i in range(NUM_LAYERS) if i != LAYER]].any()
        assert not changed[:, LAYER].any(1).any(1)[~own].any()

    # -- the oracle

    def roped(self, s, which):
        """Q or K of a sequence after RoPE and rotation; V as it is or rotated: ``[n, heads, head_dim]``."""
        x = self.qkv[s][which].double().numpy()
        if which == 2:
            return x @ self.basis if self.rotate_v else x
        cos, sin = self.cos_sin[: len(x), None].double().numpy().transpose(3, 0, 1, 2)
        a, b = np.split(x, 2, axis=-1)
        return np.concatenate([a * cos - b * sin, b * cos + a * sin], axis=-1) @ self.basis

    def stored(self, s, which, end):
        """Rows 0 .. end - 1 of a sequence, decoded from the pool's bytes: ``[end, heads, head_dim]``."""
        slots = [(self.tables[s][t // self.tokens_per_block], t % self.tokens_per_block) for t in range(end)]
        rows = np.stack([self.pool.data[b, LAYER, which, :, i].numpy() for b, i in slots])
        if not self.format.quantized:
            return rows.view(DTYPES[self.format.dtype]).astype(np.float64)
        half = self.format.head_dim // 2
        codes = np.stack([rows[..., :half] & 15, rows[..., :half] >> 4], axis=-1).reshape(*rows.shape[:-1], -1)
        tail = rows[..., half:].copy().view(np.float16).astype(np.float64)
        return codes * tail[..., :1] + tail[..., 1:]

    def expected(self, part, window=None, softcap=None, softmax_scale=None):
        """What a part should give: ``[count, num_heads, head_dim]`` in float64."""
        s, start, count, kind = part
        end = start + count
        q, keys, values = self.roped(s, 0)[start:end], self.stored(s, 0, end), self.stored(s, 1, end)
        if kind == PREFILL:  # its own chunk comes unquantized
            keys[start:], values[start:] = self.roped(s, 1)[start:end], self.roped(s, 2)[start:end]
        distance = np.arange(start, end)[:, None] - np.arange(end)
        visible = (distance >= 0) & (distance < (window or end))
        out = np.empty_like(q)
        for h in range(q.shape[1]):
            kv_head = h * keys.shape[1] // q.shape[1]
            score = q[:, h] @ keys[:, kv_head].T * (softmax_scale or q.shape[-1] ** -0.5)
            if softcap is not None:
                score = softcap * np.tanh(score / softcap)
            weight = np.where(visible, np.exp(score), 0)
            out[:, h] = weight @ values[:, kv_head] / weight.sum(-1, keepdims=True)
        return out

    def check(self, parts, atol=0.0, garbage=False, **options):
        before = self.pool.data.clone()
        got = self.run(parts, garbage, **options)
        self.check_only_own_rows_changed(before, parts)
        for part, out in zip(parts, got, strict=True):
            expected = self.expected(part, **options)
            values = np.abs(self.roped(part[0], 2)).max()
            bound = atol or chain_rounding(self.format.head_dim + part[1] + part[2], values)
            np.testing.assert_allclose(out, expected, atol=bound, rtol=0)


def with_garbage(inputs, used):
    """Mark blocks with bit 31, and put huge entries after each sequence's own."""
    offsets = inputs.kv_cache_block_offsets
    wide = np.full((*offsets.shape[:3], offsets.shape[3] + 5), np.iinfo(np.int32).max, dtype=np.int32)
    for i, n in enumerate(used):
        wide[0, i, :, :n] = offsets[0, i, :, :n] | np.int32(-(2**31))
    return dataclasses.replace(inputs, kv_cache_block_offsets=wide)


def prefills(lengths=LENGTHS):
    return [(s, 0, n, PREFILL) for s, n in enumerate(lengths)]


def decodes(lengths=LENGTHS):
    return [(s, n - 1, 1, DECODE) for s, n in enumerate(lengths)]


# -- prefill, decode, both


@pytest.mark.parametrize("head_dim", [64, 96, 128, 256])
@pytest.mark.parametrize("kv", ["fp16", "int4", "saw_int4"])
def test_prefill_attends_to_itself_unquantized(kv, head_dim):
    World(kv, head_dim=head_dim).check(prefills())


@pytest.mark.parametrize("head_dim", [64, 96, 128, 256])
@pytest.mark.parametrize("kv", ["fp16", "int4", "saw_int4"])
def test_decode_attends_to_the_pool(kv, head_dim):
    world = World(kv, head_dim=head_dim)
    world.fill([n - 1 for n in LENGTHS])
    world.check(decodes())


@pytest.mark.parametrize("tokens_per_block", [16, 32, 64, 128])
@pytest.mark.parametrize("kv", ["fp16", "saw_int4"])
def test_prefill_after_history(kv, tokens_per_block):
    lengths = [n + 20 for n in LENGTHS]
    world = World(kv, tokens_per_block=tokens_per_block, lengths=lengths)
    history = [n - 20 for n in lengths]
    world.fill(history)
    world.check([(s, h, 20, PREFILL) for s, h in enumerate(history)])


@pytest.mark.parametrize("kv", ["fp16", "int4", "saw_int4"])
def test_chunks_and_decodes_in_one_step(kv):
    lengths = (70, 64, 33, 5, 80)
    world = World(kv, lengths=lengths)
    world.fill([32, 63, 32, 0, 79])
    world.check([(0, 32, 38, PREFILL), (3, 0, 5, PREFILL), (1, 63, 1, DECODE), (4, 79, 1, DECODE), (2, 32, 1, DECODE)])


@pytest.mark.parametrize("heads", [(6, 1), (4, 4), (8, 2), (1, 1), (12, 4)])
@pytest.mark.parametrize("kv", ["fp16", "saw_int4"])
def test_groups_of_query_heads(kv, heads):
    world = World(kv, heads=heads, lengths=(40, 17, 33))
    world.fill([20, 16, 0])
    world.check([(0, 20, 20, PREFILL), (2, 0, 33, PREFILL), (1, 16, 1, DECODE)])


@pytest.mark.parametrize(("head_dim", "order"), [(64, 16), (96, 16), (96, 32), (128, 16), (128, 64), (256, 32)])
def test_orders(head_dim, order):
    world = World(order=order, head_dim=head_dim, lengths=(40, 17))
    world.fill([20, 16])
    world.check([(0, 20, 20, PREFILL), (1, 16, 1, DECODE)])


@pytest.mark.parametrize("window", [1, 3, 16, 17, 40, 1000])
@pytest.mark.parametrize("kv", ["fp16", "saw_int4"])
def test_sliding_window(kv, window):
    world = World(kv, lengths=(70, 65, 3))
    world.fill([30, 64, 2])
    world.check([(0, 30, 40, PREFILL), (1, 64, 1, DECODE), (2, 2, 1, DECODE)], window=window)


@pytest.mark.parametrize("options", [{"softcap": 2.0}, {"softmax_scale": 0.5}, {"softcap": 0.5, "window": 9}])
@pytest.mark.parametrize("kv", ["fp16", "saw_int4"])
def test_softcap_and_scale(kv, options):
    world = World(kv, lengths=(40, 17))
    world.fill([20, 16])
    parts = [(0, 20, 20, PREFILL), (1, 16, 1, DECODE)]
    plain = world.run(parts)
    world.check(parts, **options)
    assert np.abs(world.run(parts, **options)[0] - plain[0]).max() > 1e-3


def test_long_prefill_is_attended_in_tiles():
    world = World(lengths=(600,), heads=(2, 1))
    world.fill([40])
    world.check([(0, 40, 560, PREFILL)])


@pytest.mark.parametrize("kv", ["fp16", "saw_int4"])
def test_half_precision_activations(kv):
    """Q, K, V and the output are rounded to fp16: 2^-11 of values of up to 2, four times."""
    world = World(kv, dtype="float16")
    world.fill([n - 1 for n in LENGTHS])
    world.check(decodes(), atol=4 * 2 * 2**-11)
    world.check(prefills(), atol=4 * 2 * 2**-11)


# -- rotation of V, centring of K


@pytest.mark.parametrize("order", [16, 64])
def test_rotated_v_comes_back_by_one_more_rotation(order):
    world = World(order=order, lengths=(40, 17), rotate_v=True)
    world.fill([20, 16])
    parts = [(0, 20, 20, PREFILL), (1, 16, 1, DECODE)]
    world.check(parts)
    plain = World("fp16", lengths=(40, 17))
    plain.fill([20, 16])
    for rotated, exact in zip(world.run(parts), plain.run(parts), strict=True):
        error = np.abs(rotated @ world.basis - exact).max()
        assert error < 0.5  # 4 bits
        assert error < np.abs(rotated - exact).max() / 3


def test_centring_leaves_the_output():
    center = torch.randn(2, 64, generator=torch.Generator().manual_seed(3)) * 5
    worlds = [World("fp16", lengths=(40, 17)), World("fp16", lengths=(40, 17))]
    outs = []
    for world, mu in zip(worlds, (None, center), strict=True):
        world.run([(0, 0, 20, PREFILL), (1, 0, 16, PREFILL)], k_center=mu)
        outs.append(world.run([(0, 20, 20, PREFILL), (1, 16, 1, DECODE)], k_center=mu))
    for plain, centred in zip(*outs, strict=True):
        np.testing.assert_allclose(centred, plain, rtol=0, atol=chain_rounding(64, 5))  # scores have a shift of 5
    stored = worlds[0].stored(0, 0, 40) - worlds[1].stored(0, 0, 40)
    np.testing.assert_allclose(stored, np.broadcast_to(center, stored.shape), rtol=0, atol=EPS * 20)


def test_centred_keys_are_rotated_after_it():
    world = World(lengths=(17,))
    mu = torch.randn(2, 64, generator=torch.Generator().manual_seed(3))
    world.run([(0, 0, 17, PREFILL)], k_center=mu)
    expected = world.roped(0, 1) - mu.double().numpy() @ world.basis
    assert np.abs(world.stored(0, 0, 17) - expected).max() < 0.5


def random_frames(heads=2, head_dim=64, condition=30.0):
    """Frames of keys and queries whose channels are ``condition`` times as large one as another."""
    rng = np.random.default_rng(6)
    left, _, right = np.linalg.svd(rng.normal(size=(heads, head_dim, head_dim)))
    k_frame = (left * np.geomspace(1, condition, head_dim) / np.sqrt(condition)) @ right
    return [torch.from_numpy(m.astype(np.float32)) for m in (k_frame, np.linalg.inv(k_frame).swapaxes(1, 2))]


def test_frames_leave_the_output():
    """Rows in fp32: what is left is rounding of the frames' products and of scores over up to `condition` terms."""
    center = torch.randn(2, 64, generator=torch.Generator().manual_seed(3))
    outs = []
    for levers in ({}, {"frames": random_frames(), "k_center": center}):
        world = World("fp16", lengths=(40, 17))
        world.run([(0, 0, 20, PREFILL), (1, 0, 16, PREFILL)], **levers)
        outs.append(world.run([(0, 20, 20, PREFILL), (1, 16, 1, DECODE)], **levers))
    for plain, framed in zip(*outs, strict=True):
        # A score is a sum of 64 products of up to 30 times the size that cancel to what they were.
        np.testing.assert_allclose(framed, plain, atol=30 * 2**-24 * 64)
        assert (framed != plain).any()


def test_rows_are_centred_and_framed():
    """The codes are those of centred keys times the head's own frame; V is left alone."""
    world, frames = World(lengths=(17,)), random_frames()
    center = torch.randn(2, 64, generator=torch.Generator().manual_seed(3))
    world.run([(0, 0, 17, PREFILL)], frames=frames, k_center=center)
    keys = world.roped(0, 1) @ world.basis - center.double().numpy()
    keys = np.einsum("thd,hde->the", keys, frames[0].double().numpy())
    step = (keys.max(-1) - keys.min(-1)) / 15
    half_a_code_and_the_clipped_ends = step * (0.5 + 15 * (1 - world.format.range_factor) / 2)
    error = np.abs(world.stored(0, 0, 17) - keys).max(-1)
    assert (error <= half_a_code_and_the_clipped_ends + 4e-3 * np.abs(keys).max()).all()
    assert (np.abs(world.stored(0, 1, 17) - world.roped(0, 2)).max(-1) < 0.5).all()


def test_a_framed_row_does_not_depend_on_the_rows_beside_it():
    frames, rows = random_frames(), []
    for parts in ([(0, 0, 40, PREFILL)], [(0, 0, 13, PREFILL), (1, 0, 64, PREFILL)]):
        world = World(lengths=(40, 64))
        world.run(parts, frames=frames)
        rows.append(world.stored(0, 1, 13))
    np.testing.assert_array_equal(*rows)


# -- the pool


@pytest.mark.parametrize("kv", ["fp16", "int4", "saw_int4"])
@pytest.mark.parametrize("which", [0, 1])
def test_rows_lie_in_their_slots(kv, which):
    world = World(kv, rotate_v=kv == "saw_int4")
    world.fill(LENGTHS)
    for s, n in enumerate(LENGTHS):
        exact, stored = world.roped(s, which + 1), world.stored(s, which, n)
        step = (exact.max(-1) - exact.min(-1)) / 15 if kv != "fp16" else np.zeros(exact.shape[:2])
        assert (np.abs(stored - exact).max(-1) <= step * 0.51 + 2e-3 * (kv != "fp16") + 1e-6).all()


@pytest.mark.parametrize("poison", [0xFF, 0x7B, 0x00])
@pytest.mark.parametrize("kv", ["fp16", "saw_int4"])
def test_garbage_in_pool_and_table_is_not_read(kv, poison):
    """Unused slots hold NaN (0xFF), huge numbers (0x7B) or zeros; unused table entries point far outside the pool."""
    world = World(kv, poison=poison, lengths=(40, 17, 64, 1))
    world.fill([20, 16, 63, 0])
    parts = [(0, 20, 20, PREFILL), (1, 16, 1, DECODE), (2, 63, 1, DECODE), (3, 0, 1, DECODE)]
    world.check(parts, garbage=True)
    world.check(parts, garbage=True, window=5)


def test_the_key_offsets_alone_name_the_blocks():
    """Blocks come from the K row of the offsets: TensorRT-LLM's V row is the same plus one."""
    inputs = StepInputs.pack([StepSequence([1, 2], 0, 2, PREFILL, [5, 7])], NUM_LAYERS)
    assert inputs.kv_cache_block_offsets.tolist() == [[[[30, 42], [31, 43]]]]


# -- bit for bit


@pytest.mark.parametrize("num_blocks", [1, 2])
@pytest.mark.parametrize("kv", ["fp16", "saw_int4", "saw_k8v4"])
def test_what_is_read_of_one_block_lies_as_what_is_read_of_several(kv, num_blocks):
    """Products take a matrix by its layout, and each layout has been probed by itself."""
    pool = PagedPool(KVFormat(kv, 64), NUM_BLOCKS, NUM_LAYERS, 2, 64)
    unused = torch.zeros(3, 64 * num_blocks, dtype=torch.int32)
    read = pool.read(LAYER, torch.arange(3 * num_blocks).view(3, -1), unused)
    assert [x.is_contiguous() for x in read] == [True, True]


@pytest.mark.parametrize(("head_dim", "heads"), [(128, (4, 2)), (64, (8, 2)), (128, (4, 1)), (96, (1, 1))])
@pytest.mark.parametrize("kv", ["fp16", "saw_int4"])
def test_a_decode_is_the_same_in_any_batch(kv, head_dim, heads):
    lengths = (257, 300, 40, 1, 130)
    world = World(kv, head_dim=head_dim, heads=heads, lengths=lengths, dtype="float16", tokens_per_block=64)
    world.fill([n - 1 for n in lengths])
    parts = decodes(lengths)
    rng = random.Random(1)
    for part in parts:
        alone = world.run([part])[0]
        for others in (1, 2, 4):
            batch = rng.sample([p for p in parts if p != part], others)
            batch.insert(rng.randint(0, others), part)
            np.testing.assert_array_equal(world.run(batch)[batch.index(part)], alone)


@pytest.mark.parametrize("kv", ["fp16", "saw_int4"])
def test_a_prefill_is_the_same_beside_others(kv):
    world = World(kv, heads=(4, 1), lengths=(300, 33, 1, 270), dtype="float16", tokens_per_block=64)
    world.fill([128, 0, 0, 269])
    part = (0, 128, 172, PREFILL)
    alone = world.run([part])[0]
    others = [(1, 0, 33, PREFILL), part, (2, 0, 1, PREFILL), (3, 269, 1, DECODE)]
    np.testing.assert_array_equal(world.run(others)[1], alone)


def test_an_exact_cache_gives_the_same_in_one_chunk_many_or_by_decoding():
    n = 290
    world = World("fp16", heads=(4, 2), head_dim=128, lengths=(n,), dtype="float16", tokens_per_block=64)
    whole = world.run([(0, 0, n, PREFILL)])[0]
    for chunk in (64, 100, 1):
        parts = [(0, i, min(chunk, n - i), DECODE if chunk == 1 else PREFILL) for i in range(0, n, chunk)]
        np.testing.assert_array_equal(np.concatenate([world.run([p])[0] for p in parts]), whole)
