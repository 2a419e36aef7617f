"""Blocks that outlive the pool: what is begun together, and who waits for what."""

from saw_trtllm.runtime.block_manager import BlockManager, BlockTable
from saw_trtllm.runtime.host_cache import HostCache

PROMPTS = [[*range(start, start + 8), 1] for start in (0, 100)]


class Copies:
    made = False

    def done(self):
        return self.made


class Memory:
    """Copies that are made when a test says so."""

    num_host_blocks = num_ready_host_blocks = 8

    def __init__(self):
        self.begun = []

    def transfer(self, stores, loads):
        self.begun.append((len(stores), len(loads), Copies()))
        return self.begun[-1][-1]


def test_each_waits_for_its_own_copies_alone():
    """Two sequences of two blocks each, which the pool has given up: what the first waits for may come first."""
    memory, blocks = Memory(), BlockManager(4, 4, enable_partial_reuse=False)
    host = HostCache(blocks, memory)
    for prompt in PROMPTS:
        table = BlockTable()
        blocks.open(table, prompt)
        blocks.grow(table, 8)
        blocks.register(table, prompt)
        blocks.close(table)
    host.begin()
    assert [(stores, loads) for stores, loads, _ in memory.begun] == [(4, 0)]
    memory.begun.pop()[-1].made = True
    host.poll()
    for index in blocks.take(4):  # something else, which nobody finds
        blocks.release(index)

    tables = [BlockTable(), BlockTable()]
    for table, prompt in zip(tables, PROMPTS, strict=True):
        assert blocks.open(table, prompt) == 0
        assert host.fetch(table, prompt, 0)
        blocks.close(table)
    host.begin()
    assert [(stores, loads) for stores, loads, _ in memory.begun] == [(0, 2), (0, 2)]
    memory.begun[1][-1].made = True
    host.poll()
    assert [host.is_fetching(table) for table in tables] == [True, False]
    assert [blocks.open(table, prompt) for table, prompt in zip(tables, PROMPTS, strict=True)] == [0, 8]
    memory.begun[0][-1].made = True
    host.poll()
    blocks.check()
    assert [host.is_fetching(table) for table in tables] == [False, False]


def test_tokens_that_come_back_are_counted_once_for_all_tables():
    """Of two tables the second sees five tokens: of sixteen tokens four blocks and two come back."""
    memory, blocks, prompt = (
        Memory(),
        BlockManager(8, 4, enable_partial_reuse=False, windows=[None, 5]),
        [*range(16), 1],
    )
    host, table = HostCache(blocks, memory), BlockTable()
    blocks.open(table, prompt)
    blocks.admit(table, 16, 16)
    blocks.register(table, prompt[:16])
    blocks.close(table)
    host.begin()
    memory.begun.pop()[-1].made = True
    host.poll()
    for index in blocks.take(8):  # something else, which nobody finds
        blocks.release(index)
    assert blocks.open(table, prompt) == 0
    assert host.fetch(table, prompt, 0)
    blocks.close(table)
    host.begin()
    memory.begun.pop()[-1].made = True
    host.poll()
    assert (host.num_loaded, host.num_loaded_tokens) == (6, 16)
    assert blocks.open(table, prompt) == 16


def test_rows_of_a_block_that_is_not_full_come_back_too():
    """A conversation goes on where it ended, and nobody holds the block that its rows are copied from."""
    memory, blocks, said = Memory(), BlockManager(4, 4), [*range(7)]
    host, table = HostCache(blocks, memory), BlockTable()
    blocks.open(table, said)
    blocks.grow(table, 7)
    blocks.register(table, said)
    blocks.register_tail(table, said)
    blocks.close(table)
    host.begin()
    assert memory.begun[-1][:2] == (2, 0)
    memory.begun.pop()[-1].made = True
    host.poll()
    for index in blocks.take(4):  # something else, which nobody finds
        blocks.release(index)

    table, goes_on = BlockTable(), [*said, 9]
    assert blocks.open(table, goes_on) == 0
    assert host.has_more(table, goes_on)
    assert host.fetch(table, goes_on, 0)
    blocks.close(table)
    host.begin()
    assert memory.begun[-1][:2] == (0, 2)
    assert host.is_fetching(table)
    memory.begun.pop()[-1].made = True
    host.poll()
    assert not host.is_fetching(table)
    assert (host.num_loaded_tokens, blocks.num_free) == (7, 3)
    assert blocks.open(table, goes_on) == 7
    assert table.partial is not None
    assert not host.has_more(table, goes_on)
    blocks.check()
