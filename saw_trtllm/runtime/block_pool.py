"""The blocks of the KV pool, by index: their owners, what finds them, and which goes first."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Sequence
from itertools import islice

import numpy as np

from saw_trtllm.runtime.block_table import Block, Content, tail_key

#: Blocks that continue one prefix and are compared with a prompt that does too, the latest first: work must be bounded
#: where thousands of prompts part at one place.
MAX_CANDIDATES = 16


class BlockPool:
    """Blocks with reference counts.

    A block is free when it has no owner. A free block that can be found keeps its content until it is needed for
    something else: the least recently freed goes first.

    Parameters
    ----------
    num_blocks : int

    Attributes
    ----------
    num_evicted : int
        Full blocks that could be found and were taken for something else.
    adopt : callable or None
        Asked with the index of a block that can be found, and with what it holds, when its last owner lets go of it;
        where it returns true, the caller is its owner until it is released.
    """

    def __init__(self, num_blocks: int) -> None:
        self.num_evicted = 0
        self.adopt: Callable[[int, Content], bool] | None = None
        self._blocks = [Block() for _ in range(num_blocks)]
        self._free: OrderedDict[int, None] = OrderedDict.fromkeys(range(num_blocks))
        self._by_key: dict[bytes, int] = {}
        self._continuations: dict[bytes, dict[int, None]] = {}  # by their parents

    @property
    def num_blocks(self) -> int:
        """Blocks in the pool."""
        return len(self._blocks)

    def take(self, count: int) -> list[int]:
        """So many free blocks, for an owner who will release them.

        Raises
        ------
        RuntimeError
            If there are fewer, or one has an owner.
        """
        if count > len(self._free):
            raise RuntimeError(f"{count} blocks are taken and {len(self._free)} are free")
        taken = []
        for _ in range(count):
            index, _ = self._free.popitem(last=False)
            block = self._blocks[index]
            if block.ref_count:
                raise RuntimeError(f"block {index} is free and has {block.ref_count} owners")
            self.num_evicted += block.key is not None
            self._forget(index)
            block.ref_count = 1
            taken.append(index)
        return taken

    def holds(self, key: bytes) -> bool:
        """Whether a full block is found by a key."""
        return key in self._by_key

    def hold(self, key: bytes) -> int:
        """The block that a key finds, for another owner, who will release it."""
        index = self._by_key[key]
        block = self._blocks[index]
        if block.ref_count == 0:
            del self._free[index]
        block.ref_count += 1
        return index

    def continuation(self, parent: bytes, tokens: np.ndarray) -> tuple[int, int]:
        """The block after ``parent`` that begins as ``tokens`` do, and for how many of them; 0 if there is none."""
        best = (-1, 0)
        for index in islice(reversed(self._continuations.get(parent, {})), MAX_CANDIDATES):
            rows = common_prefix(self._blocks[index].tokens, tokens)
            if rows > best[1]:
                best = (index, rows)
        return best

    def publish(self, index: int, content: Content) -> None:
        """Let others find a block that has been given a full block's content."""
        if content.key not in self._by_key:
            self._blocks[index].key = content.key
            self._by_key[content.key] = index
            self._continue(index, content.parent, content.tokens)

    def publish_tail(self, index: int, content: Content) -> None:
        """Let others find the rows of a block that is not full, which has been given its content."""
        self._continue(index, content.parent, content.tokens)

    def forget(self) -> None:
        """Let nobody find any block: what all of them hold is lost. Their owners keep them."""
        for index in range(self.num_blocks):
            self._forget(index)

    def release(self, index: int, outlives: bool = True) -> None:
        """Give a block back.

        Parameters
        ----------
        index : int
        outlives : bool
            Whether it may be kept elsewhere.

        Raises
        ------
        RuntimeError
            If it has no owner: it has already been given back.
        """
        block = self._blocks[index]
        if block.ref_count < 1:
            raise RuntimeError(f"block {index} is given back and has no owner")
        if block.ref_count == 1 and outlives and self._adopted(index, block):
            return
        block.ref_count -= 1
        if block.ref_count == 0:
            self._free[index] = None
            # What nobody can find again is the first to be used.
            if block.parent is None:
                self._free.move_to_end(index, last=False)

    def check(self) -> None:
        """Raise RuntimeError if counts, free list and index contradict each other."""
        for index, block in enumerate(self._blocks):
            if block.ref_count < 0 or (block.ref_count == 0) != (index in self._free):
                raise RuntimeError(f"block {index} has {block.ref_count} owners and is free: {index in self._free}")
            if block.key is not None and self._by_key.get(block.key) != index:
                raise RuntimeError(f"block {index} has a key that finds block {self._by_key.get(block.key)}")
            if (block.parent is not None) != (index in self._continuations.get(block.parent or b"", {})):
                raise RuntimeError(f"block {index} continues another prefix than the index has")
        if len(self._by_key) != sum(b.key is not None for b in self._blocks):
            raise RuntimeError("the index holds keys of blocks that have none")
        if sum(map(len, self._continuations.values())) != sum(b.parent is not None for b in self._blocks):
            raise RuntimeError("the index holds continuations that no block is")

    def _adopted(self, index: int, block: Block) -> bool:
        if block.parent is None or self.adopt is None:
            return False
        key = tail_key(block.parent, block.tokens) if block.key is None else block.key
        return self.adopt(index, Content(key, block.parent, block.tokens))

    def _continue(self, index: int, parent: bytes, tokens: Sequence[int] | np.ndarray) -> None:
        block = self._blocks[index]
        block.parent, block.tokens = parent, np.asarray(tokens, dtype=np.int32)
        self._continuations.setdefault(parent, {})[index] = None

    def _forget(self, index: int) -> None:
        """Let nobody find a block: its content is about to change."""
        block = self._blocks[index]
        if block.key is not None:
            del self._by_key[block.key]
        if block.parent is not None:
            continuations = self._continuations[block.parent]
            del continuations[index]
            if not continuations:
                del self._continuations[block.parent]
        block.key = block.parent = None


def common_prefix(a: Sequence[int] | np.ndarray, b: np.ndarray) -> int:
    """How many leading tokens two arrays have in common."""
    n = min(len(a), len(b))
    different = np.flatnonzero(np.asarray(a[:n]) != b[:n])
    return int(different[0]) if len(different) else n
