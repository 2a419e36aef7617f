"""The blocks of the KV pool: reference counts, prefix reuse, eviction."""

from __future__ import annotations

import hashlib
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np


@dataclass
class Block:
    """A block's owners and, once its content is known, the key that finds it."""

    ref_count: int = 0
    key: bytes | None = None


@dataclass
class BlockTable:
    """The blocks of one sequence, in order.

    Attributes
    ----------
    blocks : list of int
    keys : list of bytes or None
        Keys of the leading full prompt blocks; None before the table is first opened.
    num_registered : int
        How many of ``keys`` are already in the manager's index.
    """

    blocks: list[int] = field(default_factory=list)
    keys: list[bytes] | None = None
    num_registered: int = 0


class BlockManager:
    """Hands out blocks, and finds those that already hold a prompt's beginning.

    A block is free when no sequence holds it. A free block that has a key keeps its content until it is needed for
    something else: the least recently freed goes first.

    Parameters
    ----------
    num_blocks : int
    tokens_per_block : int
    enable_block_reuse : bool
        Whether blocks are found again by their content.
    reuse_multiple : int
        A match is cut to a multiple of so many tokens.
    """

    def __init__(
        self, num_blocks: int, tokens_per_block: int, enable_block_reuse: bool = True, reuse_multiple: int = 1
    ) -> None:
        self.tokens_per_block = tokens_per_block
        self.enable_block_reuse = enable_block_reuse
        self._reuse_multiple = reuse_multiple
        self._blocks = [Block() for _ in range(num_blocks)]
        self._free: OrderedDict[int, None] = OrderedDict.fromkeys(range(num_blocks))
        self._by_key: dict[bytes, int] = {}

    @property
    def num_blocks(self) -> int:
        """Blocks in the pool."""
        return len(self._blocks)

    @property
    def num_free(self) -> int:
        """Blocks that no sequence holds."""
        return len(self._free)

    def blocks_for(self, num_tokens: int) -> int:
        """How many blocks so many tokens fill."""
        return -(-num_tokens // self.tokens_per_block)

    def open(self, table: BlockTable, prompt: Sequence[int], reuse: bool = True) -> int:
        """Begin a sequence with the cached blocks of its prompt, referenced for it.

        At least the prompt's last token is left to compute, since its logits are needed.

        Parameters
        ----------
        table : BlockTable
            New, or closed.
        prompt : sequence of int
        reuse : bool
            False for a sequence that must compute its whole prompt.

        Returns
        -------
        int
            How many tokens the table's blocks already hold.
        """
        if table.keys is None:  # a sequence that waits is opened at every step
            table.keys = self._chain(prompt) if self.enable_block_reuse and reuse else []
        hits = 0
        while hits < len(table.keys) and table.keys[hits] in self._by_key:
            hits += 1
        num_tokens = min(hits * self.tokens_per_block, len(prompt) - 1)
        num_tokens -= num_tokens % max(self._reuse_multiple, self.tokens_per_block)
        for key in table.keys[: num_tokens // self.tokens_per_block]:
            table.blocks.append(self._hold(self._by_key[key]))
        table.num_registered = len(table.blocks)
        return num_tokens

    def grow(self, table: BlockTable, num_tokens: int) -> bool:
        """Make room for ``num_tokens`` in all. False, with nothing changed, when the free blocks do not suffice.

        Raises
        ------
        RuntimeError
            If a free block has an owner.
        """
        held = len(table.blocks)
        if num_tokens <= held * self.tokens_per_block:  # mostly so: a decode needs a block now and then
            return True
        missing = self.blocks_for(num_tokens) - held
        if missing > len(self._free):
            return False
        for _ in range(missing):
            index, _ = self._free.popitem(last=False)
            block = self._blocks[index]
            if block.ref_count:
                raise RuntimeError(f"block {index} is free and has {block.ref_count} owners")
            if block.key is not None:
                del self._by_key[block.key]
                block.key = None
            block.ref_count = 1
            table.blocks.append(index)
        return True

    def register(self, table: BlockTable, num_tokens: int) -> None:
        """Let others find the prompt's full blocks among the first ``num_tokens``, which have been computed."""
        end = min(num_tokens // self.tokens_per_block, len(table.keys))
        for i in range(table.num_registered, end):
            # A twin computed in the same step may have come first; its block serves, ours stays unnamed.
            if table.keys[i] not in self._by_key:
                self._blocks[table.blocks[i]].key = table.keys[i]
                self._by_key[table.keys[i]] = table.blocks[i]
        table.num_registered = max(table.num_registered, end)

    def close(self, table: BlockTable) -> None:
        """Give a sequence's blocks back. The last are evicted first: a prefix outlives its continuations.

        Raises
        ------
        RuntimeError
            If a block has no owner: it has already been given back.
        """
        for index in reversed(table.blocks):
            block = self._blocks[index]
            if block.ref_count < 1:
                raise RuntimeError(f"block {index} is given back and has no owner")
            block.ref_count -= 1
            if block.ref_count == 0:
                self._free[index] = None
                # What nobody can find again is the first to be used.
                if block.key is None:
                    self._free.move_to_end(index, last=False)
        table.blocks = []  # a new list: whoever keeps the old one's content must not take it for this
        table.num_registered = 0

    def check(self) -> None:
        """Raise RuntimeError if counts, free list and index contradict each other."""
        for index, block in enumerate(self._blocks):
            if block.ref_count < 0 or (block.ref_count == 0) != (index in self._free):
                raise RuntimeError(f"block {index} has {block.ref_count} owners and is free: {index in self._free}")
            if block.key is not None and self._by_key.get(block.key) != index:
                raise RuntimeError(f"block {index} has a key that finds block {self._by_key.get(block.key)}")
        if len(self._by_key) != sum(b.key is not None for b in self._blocks):
            raise RuntimeError("the index holds keys of blocks that have none")

    def _hold(self, index: int) -> int:
        block = self._blocks[index]
        if block.ref_count == 0:
            del self._free[index]
        block.ref_count += 1
        return index

    def _chain(self, prompt: Sequence[int]) -> list[bytes]:
        """Digests of the prompt's full blocks, each over all tokens up to its end."""
        full = len(prompt) // self.tokens_per_block
        tokens = np.asarray(prompt[: full * self.tokens_per_block], dtype=np.int32).reshape(full, self.tokens_per_block)
        keys, digest = [], hashlib.sha256()
        for block in tokens:
            digest.update(block.tobytes())
            keys.append(digest.digest())
        return keys
