"""With which blocks a sequence can begin: each block table must have what the next query reads."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from saw_trtllm.engine.windows import first_block


class PrefixMatch:
    """Matches of sequences, whose keys are in the order of a :class:`saw_trtllm.runtime.block_table.BlockTable`.

    Parameters
    ----------
    windows : sequence of int or None
        Of each block table, the tokens that a query sees, its own among them; None for all.
    tokens_per_block : int
    grain : int
        A match ends at a multiple of so many tokens.
    """

    def __init__(self, windows: Sequence[int | None], tokens_per_block: int, grain: int) -> None:
        self._windows = list(windows)
        self._bounded = any(window is not None for window in windows)
        self._tokens_per_block, self._grain = tokens_per_block, grain

    def first(self, num_tokens: int) -> list[int]:
        """The first block of each table that a query at ``num_tokens`` reads."""
        return [first_block(num_tokens, window, self._tokens_per_block) for window in self._windows]

    def needed(self, keys: Sequence[bytes], found: Callable[[bytes], bool]) -> list[bytes]:
        """Keys of the blocks that a sequence would begin with, if those were there that ``found`` is true of."""
        size, tables, end = self._tokens_per_block, len(self._windows), self.longest(keys, found)
        while self._bounded and end:
            cut = end * size - end * size % self._grain
            # The last token may be left to compute, whose query reads a row more.
            missing = self.missing(keys, cut - 1, cut // size, found)
            if missing < 0 and cut == end * size:
                break
            end = cut // size if missing < 0 else missing
        first = self.first(end * size - 1)
        return [key for i, key in enumerate(keys[: end * tables]) if i // tables >= first[i % tables]]

    def longest(self, keys: Sequence[bytes], found: Callable[[bytes], bool]) -> int:
        """Blocks of the longest match that ends with one."""
        return self.within_windows(keys, self.unbounded(keys, found), found)

    def unbounded(self, keys: Sequence[bytes], found: Callable[[bytes], bool]) -> int:
        """Leading blocks that are found in each table without a window."""
        tables = len(self._windows)
        end = len(keys) // tables
        for i, window in enumerate(self._windows):
            if window is None:
                hits = 0
                while hits < end and found(keys[hits * tables + i]):
                    hits += 1
                end = hits
        return end

    def within_windows(self, keys: Sequence[bytes], end: int, found: Callable[[bytes], bool]) -> int:
        """The most blocks, up to ``end``, after which a query finds what it reads in the tables with a window."""
        while self._bounded and (missing := self.missing(keys, end * self._tokens_per_block, end, found)) >= 0:
            end = missing
        return end

    def missing(self, keys: Sequence[bytes], num_tokens: int, end: int, found: Callable[[bytes], bool]) -> int:
        """The last block before ``end`` that a query at ``num_tokens`` reads and that is not found, or -1.

        Of the tables with a window.
        """
        tables, missing = len(self._windows), -1
        for i, window in enumerate(self._windows):
            if window is not None:
                first = max(first_block(num_tokens, window, self._tokens_per_block), missing + 1)
                absent = (j for j in range(end - 1, first - 1, -1) if not found(keys[j * tables + i]))
                missing = next(absent, missing)
        return missing
