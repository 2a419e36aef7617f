import random

import numpy as np
import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import Bundle, RuleBasedStateMachine, consumes, invariant, rule

from saw_trtllm.engine.windows import first_block
from saw_trtllm.runtime.block_manager import BlockManager
from saw_trtllm.runtime.block_table import BlockTable, of_table


def manager_of_whole_blocks(num_blocks, tokens_per_block, **options):
    return BlockManager(num_blocks, tokens_per_block, enable_partial_reuse=False, **options)


def fill(manager, prompt):
    """Open a table for a prompt, give it room and compute it all."""
    table = BlockTable()
    reused = manager.open(table, prompt)
    assert manager.grow(table, len(prompt))
    manager.register(table, prompt)
    return table, reused


def test_blocks_for():
    manager = manager_of_whole_blocks(8, 4)
    assert [manager.blocks_for(n) for n in (0, 1, 4, 5, 8, 9)] == [0, 1, 1, 2, 2, 3]


def test_grow_takes_what_is_missing_or_nothing():
    manager = manager_of_whole_blocks(4, 4)
    a, b = BlockTable(), BlockTable()
    manager.open(a, [1])
    assert manager.grow(a, 5)
    assert manager.grow(a, 8)
    assert (len(a.blocks), manager.num_free) == (2, 2)
    manager.open(b, [2])
    assert not manager.grow(b, 9)
    assert (b.blocks, manager.num_free) == ([], 2)
    assert manager.grow(b, 8)
    assert len({*a.blocks, *b.blocks}) == 4
    manager.close(a)
    assert (a.blocks, manager.num_free) == ([], 2)
    manager.check()


def test_a_block_has_its_owners_alone():
    manager = manager_of_whole_blocks(2, 4)
    table, _ = fill(manager, [1, 2, 3, 4, 5])
    again = BlockTable(list(table.blocks))
    manager.close(table)
    with pytest.raises(RuntimeError, match="is given back and has no owner"):
        manager.close(again)
    manager._blocks[0].ref_count = 1
    with pytest.raises(RuntimeError, match="is free and has 1 owners"):
        manager.grow(BlockTable(), 8)


def test_a_prefix_is_shared_while_both_live():
    manager = manager_of_whole_blocks(8, 4)
    prompt = list(range(10))
    a, none = fill(manager, prompt)
    b, reused = fill(manager, [*prompt[:8], 99, 98])
    assert (none, reused) == (0, 8)
    assert a.blocks[:2] == b.blocks[:2]
    assert a.blocks[2] != b.blocks[2]
    assert manager.num_free == 8 - 4
    manager.close(a)
    assert manager.num_free == 8 - 3
    manager.check()
    manager.close(b)
    assert manager.num_free == 8
    manager.check()


def test_a_prefix_is_found_after_its_owners_end():
    manager = manager_of_whole_blocks(8, 4)
    a, _ = fill(manager, list(range(12)))
    blocks = list(a.blocks)
    manager.close(a)
    b, reused = fill(manager, list(range(13)))
    assert reused == 12
    assert b.blocks[:3] == blocks


def test_the_last_token_is_always_left_to_compute():
    manager = manager_of_whole_blocks(8, 4)
    manager.close(fill(manager, list(range(8)))[0])
    assert fill(manager, list(range(8)))[1] == 4
    assert fill(manager, list(range(9)))[1] == 8
    assert fill(manager, [0])[1] == 0


def test_a_key_names_all_tokens_before_it():
    """The same second block after another first one is another block."""
    manager = manager_of_whole_blocks(8, 4)
    fill(manager, [0, 0, 0, 0, 1, 1, 1, 1, 2])
    assert fill(manager, [9, 0, 0, 0, 1, 1, 1, 1, 2])[1] == 0
    assert fill(manager, [0, 0, 0, 0, 1, 1, 1, 9, 2])[1] == 4


def test_a_sequence_that_has_its_keys_is_opened_without_hashing():
    """Its keys come of the thread that sends it: no step is to wait for the digests of a long prompt."""
    manager, table = manager_of_whole_blocks(8, 4), BlockTable()
    fill(manager, list(range(13)))
    manager.name(table, range(13))
    keys, table.digest = list(table.keys), "nothing that could be updated"
    assert manager.open(table, list(range(13))) == 12
    assert table.keys == keys
    manager.close(table)
    off, table = manager_of_whole_blocks(8, 4, enable_block_reuse=False), BlockTable()
    off.name(table, range(13))
    assert (table.keys, table.digest) == ([], None)


def test_matches_are_cut_to_the_multiple():
    manager = manager_of_whole_blocks(16, 4, reuse_multiple=8)
    fill(manager, list(range(20)))
    assert fill(manager, list(range(20)))[1] == 16
    assert fill(manager, [*range(15), 99])[1] == 8
    assert fill(manager, list(range(8)))[1] == 0


def test_a_match_within_a_block_is_copied():
    manager = BlockManager(16, 4)
    a, _ = fill(manager, list(range(10)))
    b, reused = fill(manager, [0, 1, 2, 3, 4, 5, 99, 98, 97])
    assert (reused, b.partial, b.blocks[0]) == (6, ([a.blocks[1]], 2), a.blocks[0])
    assert b.blocks[1] != a.blocks[1]
    manager.register_tail(a, list(range(10)))
    last = a.blocks[2]
    manager.close(a)
    manager.check()
    c, reused = fill(manager, list(range(14)))
    assert (reused, c.partial) == (10, ([last], 2))
    assert fill(manager, [0, 1, 2, 3, 77])[1] == 4
    assert fill(manager, [0, 1, 55])[1] == 2
    manager.check()


def test_the_longest_continuation_is_taken():
    manager = BlockManager(16, 4)
    tables = [fill(manager, [1, 1, 1, 1, *rest])[0] for rest in ([2, 3, 4, 5], [2, 3, 9, 9], [2, 8, 8, 8])]
    table = BlockTable()
    assert manager.open(table, [1, 1, 1, 1, 2, 3, 9, 0]) == 7
    assert table.partial == ([tables[1].blocks[1]], 3)


def test_rows_that_are_taken_for_something_else_are_not_found():
    manager = BlockManager(2, 4)
    table, _ = fill(manager, [1, 2, 3, 4, 5, 6])
    manager.register_tail(table, [1, 2, 3, 4, 5, 6])
    manager.close(table)
    other = BlockTable()
    manager.open(other, [9])
    manager.grow(other, 8)
    manager.close(other)
    manager.check()
    assert manager.open(BlockTable(), [1, 2, 3, 4, 5, 6, 7]) == 0


def test_only_computed_blocks_are_found():
    manager = manager_of_whole_blocks(8, 4)
    a, b = BlockTable(), BlockTable()
    prompt = list(range(12))
    manager.open(a, prompt)
    manager.grow(a, 12)
    manager.register(a, prompt[:7])
    assert manager.open(b, prompt) == 4
    manager.close(b)
    manager.register(a, prompt)
    assert manager.open(b, prompt) == 8


def test_reuse_can_be_off_for_all_or_for_one():
    manager = manager_of_whole_blocks(8, 4, enable_block_reuse=False)
    fill(manager, list(range(8)))
    assert fill(manager, list(range(9)))[1] == 0
    manager = manager_of_whole_blocks(8, 4)
    own = BlockTable()
    assert manager.open(own, list(range(8)), reuse=False) == 0
    manager.grow(own, 8)
    manager.register(own, list(range(8)))
    assert fill(manager, list(range(9)))[1] == 0
    manager.check()


def test_twins_of_one_step_keep_one_name():
    manager = manager_of_whole_blocks(8, 4)
    tables = [BlockTable(), BlockTable()]
    for t in tables:
        assert manager.open(t, list(range(9))) == 0
        manager.grow(t, 9)
    for t in tables:
        manager.register(t, list(range(9)))
    manager.check()
    late = BlockTable()
    manager.open(late, list(range(9)))
    assert late.blocks == tables[0].blocks[:2]
    for t in (*tables, late):
        manager.close(t)
    manager.check()


def test_the_least_recently_freed_goes_first_and_a_prefix_outlives_its_end():
    manager = manager_of_whole_blocks(6, 4)
    a, b = fill(manager, [1] * 9)[0], fill(manager, [2] * 9)[0]  # two named blocks and one without a name each
    nameless = {a.blocks[2], b.blocks[2]}
    old, young = a.blocks[:2], b.blocks[:2]
    manager.close(a)
    manager.close(b)
    taken = BlockTable()
    manager.open(taken, [3])
    manager.grow(taken, 24)
    assert set(taken.blocks[:2]) == nameless
    assert taken.blocks[2:] == [old[1], old[0], young[1], young[0]]


def test_a_used_prefix_is_young_again():
    manager = manager_of_whole_blocks(4, 4)
    a, b = fill(manager, [1] * 8)[0], fill(manager, [2] * 8)[0]
    manager.close(a)
    manager.close(b)
    manager.close(fill(manager, [1] * 5)[0])
    table = BlockTable()
    manager.open(table, [3])
    manager.grow(table, 8)
    assert fill(manager, [1] * 5)[1] == 4


@pytest.mark.parametrize("windows", [(4,), (None, 3), (5, 2), (3, None, 4)])
@pytest.mark.parametrize("grain", [1, 2, 4])
def test_a_match_with_windows_is_the_longest_there_is(windows, grain):
    """Beside a search of all its ends, in pools that are too small for what was there."""
    rng, size = random.Random(len(windows) + grain), 2
    manager = BlockManager(
        9 * len(windows), size, enable_partial_reuse=grain < size, reuse_multiple=grain, windows=windows, step=4
    )

    def is_there(table, tokens, end):
        full, rows = divmod(end, size)
        for i, window in enumerate(windows):
            blocks = range(first_block(end, window, size), full)
            if not all(manager.holds(table.keys[place * len(windows) + i]) for place in blocks):
                return False
            parent = table.keys[(full - 1) * len(windows) + i] if full else of_table(table.root, i)
            if rows and manager.continuation(parent, np.array(tokens[end - rows : end]))[1] < rows:
                return False
        return True

    lengths = []
    for _ in range(400):
        tokens = [rng.randrange(2) for _ in range(rng.randint(2, 14))]
        table = BlockTable()
        manager.name(table, tokens)
        longest = max(end for end in range(0, len(tokens), grain) if is_there(table, tokens, end))
        lengths.append(manager.open(table, tokens))
        assert lengths[-1] == longest
        manager.admit(table, len(tokens), lengths[-1] + 1)
        for end in range(lengths[-1] + 1, len(tokens) + 1):
            assert manager.grow(table, end)
            manager.register(table, tokens[:end])
            manager.drop(table, end)
        manager.register_tail(table, tokens)
        manager.close(table)
    assert len(set(lengths)) > 1
    manager.check()


def test_check_notices():
    manager = manager_of_whole_blocks(2, 4)
    table, _ = fill(manager, [1, 2, 3, 4])
    manager._blocks[table.blocks[0]].ref_count = 0
    with pytest.raises(RuntimeError, match="owners"):
        manager.check()


class Machine(RuleBasedStateMachine):
    """Random lives of sequences over few tokens, so that prefixes meet; the pool's content is kept beside it."""

    tables = Bundle("tables")

    def __init__(self):
        super().__init__()
        self.manager = BlockManager(10, 2, reuse_multiple=4)
        self.content = {}  # block -> all tokens up to its end
        self.live = []

    @rule(target=tables, prompt=st.lists(st.integers(0, 1), min_size=1, max_size=9))
    def begin(self, prompt):
        sequence = {"prompt": prompt, "table": BlockTable(), "computed": 0}
        reused = self.manager.open(sequence["table"], prompt)
        assert reused % 4 == 0
        assert reused < len(prompt)
        assert reused == 2 * len(sequence["table"].blocks)
        for i, block in enumerate(sequence["table"].blocks):
            assert self.content[block] == tuple(prompt[: 2 * i + 2])
        sequence["computed"] = reused
        self.live.append(sequence)
        return sequence

    @rule(sequence=tables, count=st.integers(1, 6))
    def compute(self, sequence, count):
        table, end = sequence["table"], sequence["computed"] + count
        before = list(table.blocks)
        grown = self.manager.grow(table, end)
        assert grown == (self.manager.blocks_for(end) <= len(table.blocks))
        assert table.blocks[: len(before)] == before
        if not grown:
            assert table.blocks == before
            return
        tokens = [*sequence["prompt"], *[7] * end][:end]
        for i, block in enumerate(table.blocks):
            if block not in before or 2 * i + 2 > sequence["computed"]:
                self.content[block] = tuple(tokens[: 2 * i + 2])
        sequence["computed"] = end
        self.manager.register(table, tokens[: len(sequence["prompt"])])

    @rule(sequence=consumes(tables))
    def end(self, sequence):
        self.live = [s for s in self.live if s is not sequence]  # two may be equal
        self.manager.close(sequence["table"])

    @invariant()
    def sound(self):
        self.manager.check()
        held = {}
        for sequence in self.live:
            assert len(set(sequence["table"].blocks)) == len(sequence["table"].blocks)
            for i, block in enumerate(sequence["table"].blocks):
                held.setdefault(block, []).append((sequence, i))
        assert self.manager.num_free == 10 - len(held)
        for owners in held.values():  # only full blocks of a common prompt have several owners
            if len(owners) > 1:
                prefixes = {tuple(s["prompt"][: 2 * i + 2]) for s, i in owners}
                assert len(prefixes) == 1
                assert all(len(s["prompt"]) >= 2 * i + 2 for s, i in owners)


TestRandomLives = Machine.TestCase
TestRandomLives.settings = settings(max_examples=60, stateful_step_count=40, deadline=None)
