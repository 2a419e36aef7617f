from dataclasses import replace

import numpy as np
import pytest

from saw_trtllm.engine.step import DECODE, PREFILL, PoolLayout, StepInputs, StepPacker, StepSequence


def as_written(sequences, layout):
    """The tensors from their description, entry by entry; what is not read is None."""
    ids, positions, offsets = [], [], []
    for s in sequences:
        ids += s.token_ids
        positions += range(s.start, s.start + len(s.token_ids))
    for layers, table in zip(layout.num_layers, layout.tables or [0, 0], strict=True):
        blocks = [s.block_table[table :: layout.num_tables] for s in sequences]
        offsets.append([[[2 * layers * b + kv for b in row] for kv in (0, 1)] for row in blocks])
    return ids, positions, offsets


def assert_packed(inputs: StepInputs, sequences, layout):
    ids, positions, offsets = as_written(sequences, layout)
    assert inputs.input_ids.tolist() == ids
    assert inputs.position_ids.tolist() == positions
    counts = [len(s.token_ids) for s in sequences]
    assert inputs.last_token_ids.tolist() == np.cumsum(counts).tolist()
    assert inputs.sequence_length.tolist() == [s.start + n for s, n in zip(sequences, counts, strict=True)]
    assert inputs.host_request_types.tolist() == [s.kind for s in sequences]
    lengths = [n if s.kind == PREFILL else s.prompt_len for s, n in zip(sequences, counts, strict=True)]
    assert inputs.context_lengths.tolist() == lengths
    for field in StepInputs.__dataclass_fields__.keys() - {"copies"}:
        assert getattr(inputs, field).dtype == np.int32
    for pool, packed in zip(offsets, inputs.kv_cache_block_offsets, strict=True):
        for s, row, table in zip(sequences, pool, packed, strict=True):
            assert table[:, : len(s.block_table) // layout.num_tables].tolist() == row


@pytest.mark.parametrize("layout", [PoolLayout([3, 2]), PoolLayout([3, 2, 3, 3], [0, 0, 1, 2])])
def test_steps_of_tables_that_grow_change_rows_come_and_go(layout):
    """Packed one after the other as each alone, and those handed out before stay as they were."""
    rng = np.random.default_rng(9)
    packer = StepPacker(layout)
    tables = {i: [] for i in range(7)}
    handed_out = []
    for _ in range(120):
        for i in tables:
            if rng.random() < 0.1:
                tables[i] = []  # a table that is closed leaves its list behind
            if not tables[i] or rng.random() < 0.3:
                tables[i].extend(rng.integers(0, 1000, layout.num_tables * rng.integers(1, 20)).tolist())
        chosen = rng.permutation(7)[: rng.integers(1, 8)] if rng.random() < 0.3 else range(7)
        prefills = rng.integers(0, len(chosen) + 1)
        sequences = []
        for place, i in enumerate(chosen):
            kind = PREFILL if place < prefills else DECODE
            ids = rng.integers(-5, 1000, 1 if kind == DECODE else rng.integers(1, 9)).tolist()
            start = int(rng.integers(0, 500))
            sequences.append(StepSequence(ids, start, start + int(rng.integers(1, 50)), kind, tables[i]))
        inputs = packer.pack(sequences)
        assert_packed(inputs, sequences, layout)
        frozen = [replace(s, block_table=list(s.block_table)) for s in sequences]
        handed_out = [*handed_out[-2:], (inputs, frozen)]
        for earlier, those in handed_out:
            assert_packed(earlier, those, layout)
