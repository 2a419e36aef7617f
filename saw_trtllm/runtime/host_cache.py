"""Blocks that outlive the pool: each has a copy in host memory, and comes back before the request that needs it.

A block is copied when its last sequence lets go of it, not when the pool takes it for something else: its content is
final by then, and nobody has to wait. Until the copy is made the cache itself is an owner of the block, so that nothing
overwrites it. What comes back comes into free blocks, beside the steps that run, and is found there like any other.
A sequence's last block, which is not full, is a tail: its rows are copied by whoever goes on with them, so that nobody
holds it once it has come back.

Where there is a disk cache, what has been copied is written there too, and what only a file has of a request comes to
the host while the request waits.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Container, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from itertools import groupby, islice
from typing import NamedTuple, Protocol

import numpy as np

from saw_trtllm.runtime.block_manager import BlockManager
from saw_trtllm.runtime.block_pool import MAX_CANDIDATES, common_prefix
from saw_trtllm.runtime.block_table import BlockTable, Content, of_table
from saw_trtllm.runtime.disk_cache import DiskCache


class PendingTransfer(Protocol):
    """Copies of blocks that have been begun."""

    def done(self) -> bool:
        """Whether all of them are made."""
        ...

    def wait(self) -> None:
        """Wait until they are."""
        ...


class CopiesMade:
    """Copies that were made when they were begun."""

    def done(self) -> bool:
        """They are."""
        return True

    def wait(self) -> None:
        """There is nothing to wait for."""


class BlockCopy(NamedTuple):
    """A block of the pool, and its place in host memory."""

    block: int
    slot: int


class HostBlocks(Protocol):
    """Memory for blocks on the host, as an executor has it.

    Attributes
    ----------
    num_host_blocks : int
        Places for blocks.
    num_ready_host_blocks : int
        Those of them that may be used yet, from the first on: it takes time to make them.
    """

    num_host_blocks: int

    @property
    def num_ready_host_blocks(self) -> int:  # noqa: D102
        ...

    def host_block(self, slot: int) -> np.ndarray:
        """The bytes of a place: uint8, of all pools one after the other."""
        ...

    def transfer(self, stores: Sequence[BlockCopy], loads: Sequence[BlockCopy]) -> PendingTransfer:
        """Begin to copy blocks to the host and from it, beside the steps.

        No step that has been launched writes to a block that is stored or reads one that is loaded, but that rows may
        be copied from it; none that is launched before the copies are made touches either but to read what is stored.
        """
        ...


@dataclass(frozen=True)
class _Store:
    """A block on its way to the host."""

    copy: BlockCopy
    content: Content


@dataclass(frozen=True)
class _Load:
    """A block on its way back, and whom it is for: a table, and the ``fetched`` that it had when it asked.

    It has the tokens ``number * tokens_per_block`` and on of the sequence; a tail's number is -1.
    """

    copy: BlockCopy
    content: Content
    number: int
    table: BlockTable
    fetched: list[int]


@dataclass(frozen=True, eq=False)
class _Batch:
    pending: PendingTransfer
    stores: list[_Store]
    loads: list[_Load]


class HostCache:
    """What the host holds of the pool's blocks; the least recently used goes first.

    Parameters
    ----------
    blocks : BlockManager
    memory : HostBlocks
    disk : DiskCache, optional

    Attributes
    ----------
    num_stored, num_loaded, num_evicted : int
        Blocks copied to the host and back, and those that were given up for others.
    num_loaded_tokens : int
        Tokens whose blocks were copied back.
    """

    def __init__(self, blocks: BlockManager, memory: HostBlocks, disk: DiskCache | None = None) -> None:
        self.num_stored = self.num_loaded = self.num_loaded_tokens = self.num_evicted = 0
        self._blocks = blocks
        self._memory = memory
        self._disk = disk
        self._reads: dict[bytes, tuple[int, Future[Content | None]]] = {}  # with the slots that are read into
        self._writes: dict[bytes, Future[None]] = {}
        self._free_slots: list[int] = []
        self._held: OrderedDict[bytes, tuple[int, Content]] = OrderedDict()  # slot and content by key
        self._tails: dict[bytes, dict[bytes, None]] = {}  # keys of those that are held, by their parents
        self._num_used = 0  # places that hold a block or are to
        self._stores: dict[bytes, _Store] = {}  # not yet done
        self._loads: dict[bytes, _Load] = {}
        self._tails_for: dict[bytes, BlockTable] = {}  # whom the tails among them are for
        self._to_begin: tuple[list[_Store], list[_Load]] = ([], [])
        self._under_way: list[_Batch] = []
        self._moving = (self._loads, self._reads)
        blocks.adopt = self._adopt

    def stats(self) -> dict[str, int]:
        """Its part of :class:`saw_trtllm.runtime.stats.Stats`."""
        disk = {} if self._disk is None else self._disk.stats()
        return disk | {
            "host_blocks": len(self._held),
            "max_host_blocks": self.num_slots,
            "stored_blocks_total": self.num_stored,
            "loaded_blocks_total": self.num_loaded,
            "loaded_tokens_total": self.num_loaded_tokens,
            "host_evicted_blocks_total": self.num_evicted,
        }

    @property
    def num_slots(self) -> int:
        """Blocks that the host holds at most."""
        return self._memory.num_host_blocks

    @property
    def is_storing(self) -> bool:
        """Whether blocks are on their way to the host, or to be."""
        return bool(self._stores)

    def seek(self, table: BlockTable) -> None:
        """Begin to read what only the disk has of a sequence, and keep what the host has.

        Parameters
        ----------
        table : BlockTable
            Opened before, so that its keys are known.
        """
        table.sought = True
        if self._disk is None:
            return
        own, on_disk = set(table.keys), self._disk.holds
        for key in self._blocks.needed(table, lambda key: self._is_near(key) or key in self._reads or on_disk(key)):
            if key in self._held:
                self._held.move_to_end(key)
            if self._is_near(key) or key in self._reads:
                continue
            if (slot := self._take_slot(own)) is None:
                break
            self._reads[key] = slot, self._disk.read(key, self._memory.host_block(slot))

    def has_more(self, table: BlockTable, tokens: Sequence[int]) -> bool:
        """Whether the host goes on where the pool ends with a sequence, whose keys are known."""
        needed = self._blocks.needed(table, self._is_near)
        return not all(map(self._blocks.holds, needed)) or bool(self._tails_after(table, needed, tokens))

    def fetch(self, table: BlockTable, tokens: Sequence[int], num_left: int) -> bool:
        """Hold what the pool has of a sequence and begin to bring back what the host has, until :meth:`let_go`.

        Parameters
        ----------
        table : BlockTable
            Opened before, so that its keys are known.
        tokens : sequence of int
            The sequence's.
        num_left : int
            Free blocks that this must leave; if it cannot, nothing is held, and it may be asked again.

        Returns
        -------
        bool
            Whether it is held.
        """
        needed = self._blocks.needed(table, lambda key: self._is_near(key) or key in self._reads)
        if not all(map(self._is_near, needed)):
            return False
        wanted = [key for key in needed if not self._blocks.holds(key) and key not in self._loads]
        table.fetched = [self._blocks.hold(key) for key in needed if self._blocks.holds(key)]
        if wanted and len(wanted) + num_left > self._blocks.num_free:
            self.let_go(table)
            return False
        tails = self._tails_after(table, needed, tokens)
        if len(wanted) + len(tails) + num_left <= self._blocks.num_free:
            wanted += tails
            self._tails_for |= dict.fromkeys(tails, table)
        places = {key: place for place, key in enumerate(table.keys)} if wanted else {}
        for key, block in zip(wanted, self._blocks.take(len(wanted)), strict=True):
            slot, content = self._held[key]
            self._held.move_to_end(key)
            number = places.get(key, -1) // self._blocks.num_tables
            self._loads[key] = _Load(BlockCopy(block, slot), content, number, table, table.fetched)
            self._to_begin[1].append(self._loads[key])
        return True

    def is_fetching(self, table: BlockTable) -> bool:
        """Whether blocks of a sequence are on their way."""
        if any(on_their_way and any(map(on_their_way.__contains__, table.keys)) for on_their_way in self._moving):
            return True
        return any(waiting is table for waiting in self._tails_for.values())

    def let_go(self, table: BlockTable) -> bool:
        """Hold nothing for a sequence any more, now or when it comes. False if nothing was held."""
        held, table.fetched = table.fetched or [], None
        for block in held:
            self._blocks.release(block)
        return bool(held)

    def begin(self) -> None:
        """Begin the copies that have come up."""
        stores, loads = self._to_begin
        if stores:
            self._begin(stores, [])
            self._to_begin = ([], loads)  # what a transfer that fails has not begun is left to reset
        # Whoever waits for the first of them need not wait for those of others.
        for _, its_loads in groupby(list(loads), lambda load: id(load.table)):
            batch = list(its_loads)
            self._begin([], batch)
            del loads[: len(batch)]

    def poll(self) -> None:
        """Take note of the copies that are made."""
        for batch in [batch for batch in self._under_way if batch.pending.done()]:
            self._under_way.remove(batch)
            for store in batch.stores:
                key = store.content.key
                del self._stores[key]
                self._held[key] = (store.copy.slot, store.content)
                self._blocks.release(store.copy.block)
                if self._is_tail(store.content):
                    self._tails.setdefault(store.content.parent, {})[key] = None
                elif self._disk is not None:
                    self._writes[key] = self._disk.write(store.content, self._memory.host_block(store.copy.slot))
            for load in batch.loads:
                del self._loads[load.content.key]
                if self._is_tail(load.content):
                    del self._tails_for[load.content.key]
                    self._blocks.publish_tail(load.copy.block, load.content)
                    self._blocks.release(load.copy.block)
                    continue
                self._blocks.publish(load.copy.block, load.content)
                if load.table.fetched is load.fetched:
                    load.fetched.append(load.copy.block)
                else:
                    self._blocks.release(load.copy.block)
            self.num_stored += len(batch.stores)
            self.num_loaded += len(batch.loads)
            self.num_loaded_tokens += sum({load.number: len(load.content.tokens) for load in batch.loads}.values())
        for key in [key for key, (_, read) in self._reads.items() if read.done()]:
            slot, read = self._reads.pop(key)
            content = read.result()
            if content is None:
                self._free_slots.append(slot)
            else:
                self._held[key] = (slot, content)

    def wait(self) -> bool:
        """Wait for the oldest copies; false if there are none."""
        self.begin()
        if self._under_way:
            self._under_way[0].pending.wait()
        elif self._disk is not None and self._reads:
            self._disk.wait([read for _, read in self._reads.values()])
        else:
            return False
        self.poll()
        return True

    def close(self) -> None:
        """Let go of the host's memory, when nothing is copied any more: the disk's last writes are made."""
        if self._disk is not None:
            self._disk.close()

    def reset(self) -> None:
        """Hold nothing: what the host held is lost, and copies that were begun are not made."""
        for stores, loads in [self._to_begin, *((batch.stores, batch.loads) for batch in self._under_way)]:
            for copy in [*(store.copy for store in stores), *(load.copy for load in loads)]:
                self._blocks.release(copy.block)
        self._held.clear()
        self._tails.clear()
        self._stores.clear()
        self._loads.clear()
        self._tails_for.clear()
        self._under_way.clear()
        self._to_begin = ([], [])
        self._free_slots.clear()
        self._num_used = 0

    def _begin(self, stores: list[_Store], loads: list[_Load]) -> None:
        pending = self._memory.transfer([m.copy for m in stores], [m.copy for m in loads])
        self._under_way.append(_Batch(pending, stores, loads))

    def _is_tail(self, content: Content) -> bool:
        return len(content.tokens) < self._blocks.tokens_per_block

    def _tails_after(self, table: BlockTable, needed: Sequence[bytes], tokens: Sequence[int]) -> list[bytes]:
        """Of each table the tail after ``needed`` that goes on as ``tokens`` do for more rows than the pool has."""
        if not self._tails:
            return []
        tables, size, tails = self._blocks.num_tables, self._blocks.tokens_per_block, []
        start = (table.keys.index(needed[-1]) // tables + 1) * size if needed else 0
        due = np.asarray(tokens[start : start + size], dtype=np.int32)
        for parent in needed[-tables:] or (of_table(table.root, i) for i in range(tables)):
            candidates = islice(reversed(self._tails.get(parent, {})), MAX_CANDIDATES)
            rows = {key: common_prefix(self._held[key][1].tokens, due) for key in candidates}
            best = max(rows, key=rows.__getitem__, default=b"")
            if rows.get(best, 0) > self._blocks.continuation(parent, due)[1] and best not in self._loads:
                tails.append(best)
        return tails

    def _is_near(self, key: bytes) -> bool:
        """Whether the pool or the host has a block."""
        return self._blocks.holds(key) or key in self._held

    def _adopt(self, index: int, content: Content) -> bool:
        """Keep a block that its last sequence lets go of, until it is copied."""
        key = content.key
        if key in self._held:
            self._held.move_to_end(key)
            return False
        if key in self._stores or key in self._reads or (slot := self._take_slot()) is None:
            return False
        self._stores[key] = _Store(BlockCopy(index, slot), content)
        self._to_begin[0].append(self._stores[key])
        return True

    def _take_slot(self, kept: Container[bytes] = ()) -> int | None:
        if self._free_slots:
            return self._free_slots.pop()
        if self._num_used < self._memory.num_ready_host_blocks:
            self._num_used += 1
            return self._num_used - 1
        for key in self._held:
            if key not in self._loads and key not in kept and self._is_written(key):
                self.num_evicted += 1
                slot, content = self._held.pop(key)
                if self._is_tail(content):
                    self._tails[content.parent].pop(key)
                    if not self._tails[content.parent]:
                        del self._tails[content.parent]
                return slot
        return None

    def _is_written(self, key: bytes) -> bool:
        """Whether nothing reads a block's bytes to write them: a write that has not begun is given up."""
        write = self._writes.pop(key, None)
        if write is None or write.cancel() or write.done():
            return True
        self._writes[key] = write
        return False
