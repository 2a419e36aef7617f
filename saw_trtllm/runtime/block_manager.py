"""Which blocks of the KV pool a sequence holds: prefix reuse, growth, windows.

The blocks of all block tables are of one pool, so that the memory goes to whatever the sequences need.
"""

from __future__ import annotations

import hashlib
import sys
from collections.abc import Callable, Sequence

import numpy as np

from saw_trtllm.engine.step import RowCopy
from saw_trtllm.engine.windows import DECODES_AHEAD, most_blocks
from saw_trtllm.runtime.block_pool import BlockPool
from saw_trtllm.runtime.block_table import BlockTable, Content, of_table
from saw_trtllm.runtime.prefix_match import PrefixMatch


class BlockManager(BlockPool):
    """Hands out blocks, and finds those that already hold a sequence's beginning.

    Parameters
    ----------
    num_blocks : int
    tokens_per_block : int
    enable_block_reuse : bool
        Whether blocks are found again by their content.
    enable_partial_reuse : bool
        Whether a match may end within a block, whose rows are then copied.
    reuse_multiple : int
        A match is cut to a multiple of so many tokens.
    windows : sequence of int or None
        Of each block table, the tokens that a query sees, its own among them; None for all.
    step : int
        Tokens of a sequence that are computed in a step, at most.

    Attributes
    ----------
    num_tables : int
    tokens_per_entry : float
        Tokens for each entry of a sequence's list of blocks.
    """

    def __init__(
        self,
        num_blocks: int,
        tokens_per_block: int,
        enable_block_reuse: bool = True,
        enable_partial_reuse: bool = True,
        reuse_multiple: int = 1,
        windows: Sequence[int | None] = (None,),
        step: int = DECODES_AHEAD,
    ) -> None:
        super().__init__(num_blocks)
        self.tokens_per_block = tokens_per_block
        self.num_tables = len(windows)
        self.tokens_per_entry = tokens_per_block / self.num_tables if self.num_tables > 1 else tokens_per_block
        self.enable_block_reuse = enable_block_reuse
        self._grain = max(reuse_multiple, 1 if enable_partial_reuse else tokens_per_block)
        self._windows = list(windows)
        self._matches = PrefixMatch(windows, tokens_per_block, self._grain)
        self._bounded = any(window is not None for window in windows)
        self._step = max(step, DECODES_AHEAD)
        self._num_promised = 0

    @property
    def num_free(self) -> int:
        """Blocks that no sequence holds, or is promised."""
        return len(self._free) - self._num_promised

    def blocks_for(self, num_tokens: int) -> int:
        """How many blocks a sequence of so many tokens holds at most."""
        return most_blocks(num_tokens, self._windows, self.tokens_per_block, self._step)

    def held(self, table: BlockTable) -> list[int]:
        """The blocks that a sequence holds."""
        if not self._bounded:
            return table.blocks
        return [b for i, b in enumerate(table.blocks) if i // self.num_tables >= table.dropped[i % self.num_tables]]

    def can_share(self, num_tokens: int) -> bool:
        """Whether two sequences with so many tokens in common may hold some of the same blocks."""
        return self.enable_block_reuse and num_tokens > max(self._grain, self.tokens_per_block)

    def open(self, table: BlockTable, tokens: Sequence[int], reuse: bool = True, salt: str = "") -> int:
        """Begin a sequence with the cached blocks of its tokens, referenced for it.

        At least the last token is left to compute, since its logits are needed.

        Parameters
        ----------
        table : BlockTable
            New, or closed. If the match ends within a block, its ``partial`` says whose rows are to be copied.
        tokens : sequence of int
            The prompt, and what has been generated.
        reuse : bool
            False for a sequence that must compute its whole prompt, and whose blocks nobody is to find.
        salt : str
            Only sequences of the same salt find each other's blocks.

        Returns
        -------
        int
            How many tokens are already computed.
        """
        if self._bounded:
            table.dropped = [0] * self.num_tables
        if not (self.enable_block_reuse and reuse):
            self._plan_drop(table)
            return 0
        self.name(table, tokens, salt)  # a sequence that waits is opened at every step, and has its keys
        num_tokens, sources = self._match(table, tokens)
        full, rows = divmod(num_tokens, self.tokens_per_block)
        if rows:
            table.partial = (sources, rows)
        if self._bounded:
            table.dropped = self._matches.first(num_tokens)
            behind = (i // self.num_tables < table.dropped[i % self.num_tables] for i in range(full * self.num_tables))
            table.blocks += [0 if gone else self.hold(key) for key, gone in zip(table.keys, behind, strict=False)]
        else:
            table.blocks += map(self.hold, table.keys[: full * self.num_tables])
        table.num_registered = full
        self._plan_drop(table)
        return num_tokens

    def name(self, table: BlockTable, tokens: Sequence[int], salt: str = "") -> None:
        """Work out the keys of a sequence's full blocks, as :meth:`open` does, in any thread before it is queued."""
        if self.enable_block_reuse:
            if table.digest is None:
                table.digest = hashlib.sha256(salt.encode())
                table.root = table.digest.digest()
            self._extend(table, tokens)

    def needed(self, table: BlockTable, found: Callable[[bytes], bool]) -> list[bytes]:
        """Keys of the blocks that a sequence would begin with, if those were there that ``found`` is true of.

        Parameters
        ----------
        table : BlockTable
            Opened before, so that its keys are known.
        found : callable
        """
        return self._matches.needed(table.keys, found)

    def missing(self, table: BlockTable, num_tokens: int) -> int:
        """Blocks that a sequence lacks to be computed up to ``num_tokens``."""
        return self.blocks_for(num_tokens) - len(self.held(table))

    def admit(self, table: BlockTable, num_tokens: int, end: int) -> list[RowCopy]:
        """Make room for a sequence's ``num_tokens``, of which those up to ``end`` are computed next.

        Where blocks come back while it is computed, the rest are promised to it and not taken yet.

        Returns
        -------
        list of RowCopy
            The rows of its match that are to be copied, in any order, before something writes to the blocks.
        """
        first = len(table.blocks)
        self.grow(table, end if self._bounded else num_tokens)
        if self._bounded:
            table.promise = (num_tokens, self.blocks_for(num_tokens))
            self._count_promised(table)
            self._plan_drop(table)
        if table.partial is None:
            return []
        sources, rows = table.partial
        for place, source in enumerate(sources, first):
            if source in table.blocks[first:]:  # free until now: its rows are where they are needed
                taken = table.blocks.index(source, first)
                table.blocks[place], table.blocks[taken] = source, table.blocks[place]
        pairs = zip(sources, table.blocks[first:], strict=False)
        return [RowCopy(source, target, rows) for source, target in pairs if source != target]

    def drop(self, table: BlockTable, num_tokens: int) -> None:
        """Give back the blocks that no query reads from the position ``num_tokens`` on.

        Only those of whole chunks are worth a copy on the host: elsewhere a match ends with a sequence, whose last
        window :meth:`close` gives back.
        """
        chunks = self._grain > self.tokens_per_block
        for i, first in enumerate(self._matches.first(num_tokens)):
            for place in range(table.dropped[i], first):
                self.release(table.blocks[place * self.num_tables + i], outlives=chunks)
            table.dropped[i] = max(first, table.dropped[i])
        if num_tokens >= table.promise[0]:
            table.promise = (0, 0)
        self._count_promised(table)
        self._plan_drop(table)

    def grow(self, table: BlockTable, num_tokens: int) -> bool:
        """Make room for ``num_tokens`` in all. False, with nothing changed, when the free blocks do not suffice.

        Raises
        ------
        RuntimeError
            If a free block has an owner.
        """
        entries, tables = len(table.blocks), self.num_tables
        if num_tokens * tables <= entries * self.tokens_per_block:  # mostly so: a decode needs a block now and then
            return True
        missing = -(-num_tokens // self.tokens_per_block) * tables - entries
        if missing > self.num_free + table.promised:
            return False
        table.blocks += self.take(missing)
        if table.promised:
            self._count_promised(table)
        return True

    def register(self, table: BlockTable, tokens: Sequence[int], start: int = 0) -> None:
        """Let others find the full blocks of ``tokens``, which have been computed.

        Parameters
        ----------
        table : BlockTable
        tokens : sequence of int
            The sequence's, from ``start`` on.
        start : int
            The end of blocks that others find already, or 0.
        """
        if table.digest is None:
            return
        computed, size = np.asarray(tokens, dtype=np.int32), self.tokens_per_block
        self._extend(table, computed, start)
        for i in range(table.num_registered, (start + len(computed)) // size):
            # A twin computed in the same step may have come first; its block serves, ours stays unnamed.
            own = computed[i * size - start : (i + 1) * size - start]
            for place in range(i * self.num_tables, (i + 1) * self.num_tables):
                self.publish(table.blocks[place], Content(table.keys[place], self._parent(table, place), own))
            table.num_registered = i + 1

    def register_tail(self, table: BlockTable, tokens: Sequence[int]) -> None:
        """Let others find the rows of ``tokens`` that do not fill a block, when the sequence is about to be closed."""
        full, rows = divmod(len(tokens), self.tokens_per_block)
        # A match that ends within a block is what finds them.
        if table.digest is None or rows < self._grain or full * self.num_tables > len(table.keys):
            return
        for place in range(full * self.num_tables, (full + 1) * self.num_tables):
            own = tokens[full * self.tokens_per_block :]
            self._continue(table.blocks[place], self._parent(table, place), own)

    def close(self, table: BlockTable) -> None:
        """Give a sequence's blocks back. The last are evicted first: a prefix outlives its continuations.

        Raises
        ------
        RuntimeError
            If a block has no owner: it has already been given back.
        """
        for index in reversed(self.held(table)):
            self.release(index)
        table.blocks = []  # a new list: whoever keeps the old one's content must not take it for this
        table.num_registered, table.partial, table.due = 0, None, 0
        if self._bounded:
            table.promise = (0, 0)
            self._count_promised(table)

    def _extend(self, table: BlockTable, tokens: Sequence[int] | np.ndarray, start: int = 0) -> None:
        """Keys of all full blocks, each a digest over the salt and all tokens up to its end."""
        size = self.tokens_per_block
        known, full = len(table.keys) // self.num_tables, (start + len(tokens)) // size
        if known < full:
            new = tokens[known * size - start : full * size - start]
            for block in np.asarray(new, dtype=np.int32).reshape(-1, size):
                table.digest.update(block.tobytes())
                key = table.digest.digest()
                table.keys += [of_table(key, i) for i in range(self.num_tables)]

    def _parent(self, table: BlockTable, place: int) -> bytes:
        """What is found before an entry of a sequence: for the first ones, the salt."""
        if place < self.num_tables:
            return of_table(table.root, place)
        return table.keys[place - self.num_tables]

    def _match(self, table: BlockTable, tokens: Sequence[int]) -> tuple[int, list[int]]:
        """Tokens of the longest match, and if it ends within a block whose rows continue it in each table."""
        size, found = self.tokens_per_block, self._by_key.__contains__
        end = self._matches.unbounded(table.keys, found)
        while True:
            sources, rows = self._partial_match(table, end, tokens)
            num_tokens = min(end * size + rows, len(tokens) - 1)
            num_tokens -= num_tokens % self._grain
            full, rows = divmod(num_tokens, size)
            missing = self._matches.missing(table.keys, num_tokens, end if full == end else full + (rows > 0), found)
            if missing < 0:
                if full < end and rows:
                    sources = [self._by_key[key] for key in table.keys[full * self.num_tables :][: self.num_tables]]
                return num_tokens, sources
            end = missing  # what ends after it, and not later than here, reads it too

    def _partial_match(self, table: BlockTable, hits: int, tokens: Sequence[int]) -> tuple[list[int], int]:
        """The block of each table that continues ``hits`` blocks as ``tokens`` do, and for how many rows all do."""
        parents = [self._parent(table, hits * self.num_tables + i) for i in range(self.num_tables)]
        if self._grain >= self.tokens_per_block or not all(parent in self._continuations for parent in parents):
            return [], 0
        start = hits * self.tokens_per_block
        due = np.asarray(tokens[start : start + self.tokens_per_block], dtype=np.int32)
        found = [self.continuation(parent, due) for parent in parents]
        return [index for index, _ in found], min(rows for _, rows in found)

    def _count_promised(self, table: BlockTable) -> None:
        left = max(0, table.promise[1] - len(self.held(table))) if table.promise[1] else 0
        self._num_promised += left - table.promised
        table.promised = left

    def _plan_drop(self, table: BlockTable) -> None:
        """Work out when a sequence has something to give back."""
        ends = [
            (dropped + 1) * self.tokens_per_block + window - 1
            for dropped, window in zip(table.dropped, self._windows, strict=False)
            if window is not None
        ]
        table.next_drop = min([*ends, *([table.promise[0]] if table.promise[0] else [])], default=sys.maxsize)
