"""The blocks that TensorRT-LLM's executor gives to sequences, shares, copies and takes away: part of the play in
:mod:`executor_contract`, after ``kvCacheManager.cpp`` and ``kvCacheTransferManager.cpp``."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

PRIMARY, SECONDARY = "primary", "secondary"


class Copy(NamedTuple):
    """Bytes to move before a step: the first ``rows`` of each head's region of a block, or all of it if 0."""

    pool: int
    source: tuple[str, int]
    target: tuple[str, int]
    rows: int

    def apply(self, memory: dict[str, np.ndarray]) -> None:
        """Move them in a pool's two memories, ``[num_blocks, num_layers, 2, num_kv_heads, tokens, row_bytes]``.

        As ``kvCacheBlockPartialCopy`` counts bytes: it knows heads, tokens and the row's size, and no more.
        """
        source, target = (memory[place][index] for place, index in (self.source, self.target))
        tokens, row_bytes = source.shape[-2:]
        width = (self.rows or tokens) * row_bytes
        target.reshape(-1, tokens * row_bytes)[:, :width] = source.reshape(-1, tokens * row_bytes)[:, :width]


@dataclass(eq=False)
class Block:
    """A block of a manager: where it lies, who uses it, and the tokens of the prefix that its rows end."""

    place: tuple[str, int]
    users: int = 0
    prefix: tuple[int, ...] | None = None


class Manager:
    """The blocks of the layers with one attention window (``WindowBlockManager``)."""

    def __init__(self, pool: int, window: int, tokens_per_block: int, num_primary: int, num_secondary: int) -> None:
        self.pool, self.window, self.tokens_per_block = pool, window, tokens_per_block
        places = [(PRIMARY, i) for i in range(num_primary)] + [(SECONDARY, i) for i in range(num_secondary)]
        self._blocks = [Block(place) for place in places]  # the least recently used come first

    def num_free(self) -> int:
        return sum(b.users == 0 and b.place[0] == PRIMARY for b in self._blocks)

    def matched(self, tokens: Sequence[int]) -> list[tuple[Block, int]]:
        """Blocks that hold a prefix of ``tokens``, each with its rows that do; the last may do so in part."""
        found: list[tuple[Block, int]] = []
        while (hit := self._longest_match(tuple(tokens), len(found) * self.tokens_per_block)) is not None:
            found.append(hit)
            if hit[1] < self.tokens_per_block:
                break
        return found

    def _longest_match(self, tokens: tuple[int, ...], start: int) -> tuple[Block, int] | None:
        best = None
        for block in self._blocks:
            prefix = block.prefix
            if prefix is None or not start < len(prefix) <= start + self.tokens_per_block:
                continue
            same = 0
            while same < min(len(prefix), len(tokens)) and prefix[same] == tokens[same]:
                same += 1
            if same > start and (best is None or same - start > best[1]):
                best = block, same - start
        return best

    def add(self, tokens: Sequence[int], reused: int, copies: list[Copy]) -> list[Block | None]:
        """Blocks for all ``tokens``, of which the first ``reused`` are taken from what is cached."""
        size = self.tokens_per_block
        hits = self.matched(tokens)[: -(-reused // size)]
        for block, _ in hits:
            block.users += 1  # so that nobody takes it
        blocks: list[Block | None] = []
        for i, (block, _) in enumerate(hits):
            rows = reused - i * size
            if rows >= size:
                self._onboard(block, copies)
                blocks.append(block)
            else:
                blocks.append(self._reuse_in_part(block, rows, copies))
        while len(blocks) * size < len(tokens):
            blocks.append(self.take(copies))
        return blocks

    def _reuse_in_part(self, block: Block, rows: int, copies: list[Copy]) -> Block:
        leaf = not any(b.prefix and b.prefix[: len(block.prefix)] == block.prefix for b in self._blocks if b != block)
        if block.users == 1 and leaf:  # nobody else needs it: it is written on
            block.prefix = None
            self._onboard(block, copies)
            return block
        new = self.take(copies)
        copies.append(Copy(self.pool, block.place, new.place, rows))
        block.users -= 1
        return new

    def _onboard(self, block: Block, copies: list[Copy]) -> None:
        if block.place[0] == SECONDARY:
            free = self.take(copies)
            copies.append(Copy(self.pool, block.place, free.place, 0))
            block.place, free.place = free.place, block.place
            free.users = 0

    def take(self, copies: list[Copy]) -> Block:
        """A free block of the primary pool. What it holds goes to the secondary pool if there is one."""
        free = next(b for b in self._blocks if b.users == 0 and b.place[0] == PRIMARY)
        if free.prefix is not None:
            other = next((b for b in self._blocks if b.users == 0 and b.place[0] == SECONDARY), None)
            if other is not None:
                copies.append(Copy(self.pool, free.place, other.place, 0))
                free.place, other.place = other.place, free.place
                self._touch(free)
                free = other
        free.prefix, free.users = None, 1
        self._touch(free)
        return free

    def grow(self, blocks: list[Block | None], table: list[int], length: int, copies: list[Copy]) -> None:
        """Make room for a decode's token, and let blocks go that its window has left behind."""
        removed = sum(b is None for b in blocks)
        while length - removed * self.tokens_per_block >= self.window + self.tokens_per_block:
            self._release(blocks[removed])
            blocks[removed] = None  # its index stays in the table
            removed += 1
        if (length - 1) % self.tokens_per_block == 0:
            blocks.append(self.take(copies))
            table.append(blocks[-1].place[1])

    def store(self, blocks: Sequence[Block | None], tokens: Sequence[int], whole_only: bool) -> None:
        """Let others find the rows of ``tokens``."""
        for i, block in enumerate(blocks):
            if block is None:
                return  # a prefix with a hole is none
            end = min((i + 1) * self.tokens_per_block, len(tokens))
            if end <= i * self.tokens_per_block or (whole_only and end < (i + 1) * self.tokens_per_block):
                return
            block.prefix = tuple(tokens[:end])

    def release(self, blocks: Sequence[Block | None]) -> None:
        for block in blocks:
            if block is not None:
                self._release(block)

    def _release(self, block: Block) -> None:
        block.users -= 1
        assert block.users >= 0
        self._touch(block)

    def _touch(self, block: Block) -> None:
        self._blocks.remove(block)
        self._blocks.append(block)
