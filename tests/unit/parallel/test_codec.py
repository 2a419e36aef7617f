"""A step arrives at the ranks as it was sent."""

from dataclasses import fields

import numpy as np
import pytest

from saw_trtllm.engine.step import DECODE, PREFILL, PoolLayout, RowCopy, StepInputs, StepPacker, StepSequence
from saw_trtllm.parallel.codec import StepDecoder, StepEncoder
from saw_trtllm.runtime.sampling import SamplingState
from saw_trtllm.runtime.sampling_params import SamplingParams

VOCAB = 50


class Text:
    def __init__(self, rng, number):
        penalty = {"repetition_penalty": 1.5} if number % 3 == 0 else {}
        self.params = SamplingParams(seed=number, temperature=1.0, **penalty)
        self.prompt = rng.integers(0, VOCAB, rng.integers(1, 40)).tolist()
        self.generated = []
        self.blocks = []


@pytest.mark.parametrize("layout", [PoolLayout((3, 2)), PoolLayout((3, 2, 3, 2, 3), (0, 0, 1, 1, 2))])
def test_each_step_arrives_as_it_was_sent(layout):
    rng = np.random.default_rng(0)
    packer, encoder, decoder = StepPacker(layout), StepEncoder(layout), StepDecoder(layout)
    tables = layout.num_tables
    texts = [Text(rng, i) for i in range(12)]
    for number in range(200):
        chosen = [texts[i] for i in sorted(rng.choice(12, rng.integers(1, 9), replace=False))]
        parts, sampling, wanted = [], [], []
        for text in chosen:
            if rng.random() < 0.05:  # preempted: other blocks, in a new list
                text.blocks = rng.integers(0, 500, len(text.blocks)).tolist()
            text.blocks += rng.integers(0, 500, tables * (rng.integers(0, 3) + (not text.blocks))).tolist()
            kind = DECODE if text.generated else PREFILL
            ids = [-1] if text.generated else text.prompt
            parts.append(StepSequence(ids, len(text.generated), len(text.prompt), kind, text.blocks))
            mask = rng.random(VOCAB) < 0.5 if rng.random() < 0.1 else None
            banned = (3, 4) if rng.random() < 0.1 else ()
            state = SamplingState(text.params, text.prompt, text.generated, banned, len(text.generated), mask)
            sampling.append(state if rng.random() < 0.8 else None)
            wanted.append(bool(rng.random() < 0.2))
        copies = [RowCopy(1, 2, 3)] if number % 7 == 0 else []
        step = packer.pack(parts, copies)
        late = rng.random() < 0.3
        arrived = decoder.decode(bytearray(encoder.encode(step, None if late else sampling, wanted)))
        assert_same(arrived.inputs, step, [len(text.blocks) // tables for text in chosen])
        assert arrived.context_logits == wanted
        assert (arrived.sampling is None) == late
        draws = decoder.decode_draws(bytearray(encoder.encode_draws(sampling))) if late else arrived.sampling
        for theirs, ours in zip(draws, sampling, strict=True):
            assert (theirs is None) == (ours is None)
            if ours is not None:
                assert (theirs.params, theirs.draw, theirs.banned) == (ours.params, ours.draw, ours.banned)
                assert np.array_equal(theirs.mask, ours.mask)
                if ours.params.penalizes:
                    assert (theirs.prompt, theirs.generated) == (ours.prompt, ours.generated)
        for text in chosen:
            text.generated.append(int(rng.integers(0, VOCAB)))


def assert_same(arrived: StepInputs, sent: StepInputs, num_blocks: list[int]) -> None:
    for field in fields(StepInputs):
        ours, theirs = getattr(sent, field.name), getattr(arrived, field.name)
        if field.name == "kv_cache_block_offsets":  # what is beyond a sequence's blocks is not read
            assert ours.shape == theirs.shape
            for i, n in enumerate(num_blocks):
                assert np.array_equal(ours[:, i, :, :n], theirs[:, i, :, :n])
        else:
            assert np.array_equal(ours, theirs), field.name
            assert field.name == "copies" or theirs.flags.writeable


def test_a_decode_costs_little_and_its_prompt_is_not_sent():
    layout = PoolLayout([32])
    packer, encoder = StepPacker(layout), StepEncoder(layout)
    blocks = [list(range(i * 256, i * 256 + 256)) for i in range(64)]
    params, prompt = SamplingParams(seed=1, temperature=1.0), list(range(8000))
    texts = [[] for _ in blocks]
    sizes = []
    for number in range(3):
        parts = [StepSequence([-1], 8000 + number, 8000, DECODE, table) for table in blocks]
        states = [SamplingState(params, prompt, text, (), number) for text in texts]
        sizes.append(len(encoder.encode(packer.pack(parts), states, [False] * 64)))
    # Eight numbers of 4 bytes a sequence, and their sizes.
    assert sizes[1] == sizes[2] < 64 * 8 * 4 + 40
