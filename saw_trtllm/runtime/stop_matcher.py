"""Runs of symbols, found in a growing sequence."""

from __future__ import annotations

from collections.abc import Hashable, Iterable, Sequence
from typing import NamedTuple


class Match(NamedTuple):
    """Where a run stands, counted from the first symbol of all; of several the least is the earliest, then shortest.

    Attributes
    ----------
    start, end : int
        Its first symbol, and the one after its last.
    run : int
        Which of the runs it is.
    """

    start: int
    end: int
    run: int


class StopMatcher:
    """Aho and Corasick's automaton ("Efficient string matching", CACM 18(6), 1975).

    Each symbol is looked at once, whatever the number and the length of the runs; building it takes time and memory in
    proportion to their total length.

    Parameters
    ----------
    runs : sequence of sequences
        What to find: bytes, or lists of token ids. None is empty.
    """

    def __init__(self, runs: Sequence[Sequence[Hashable]]) -> None:
        # A state stands for a beginning of some run: the longest that the symbols so far end in.
        self._next: dict[tuple[int, Hashable], int] = {}
        self._depth = [0]
        self._fallback = [0]  # the next longest such beginning
        self._longest: list[int | None] = [None]  # the longest run that ends here
        self._lengths = [len(run) for run in runs]
        self._state = 0
        self._length = 0
        for index, run in enumerate(runs):
            self._insert(index, run)
        self._link()

    def _insert(self, index: int, run: Sequence[Hashable]) -> None:
        state = 0
        for depth, symbol in enumerate(run, 1):
            state = self._next.setdefault((state, symbol), len(self._depth))
            if state == len(self._depth):
                self._depth.append(depth)
                self._fallback.append(0)
                self._longest.append(None)
        self._longest[state] = index

    def _link(self) -> None:
        for (state, symbol), child in sorted(self._next.items(), key=lambda edge: self._depth[edge[1]]):
            if state:
                self._fallback[child] = self._follow(self._fallback[state], symbol)
            if self._longest[child] is None:
                self._longest[child] = self._longest[self._fallback[child]]

    def _follow(self, state: int, symbol: Hashable) -> int:
        while (child := self._next.get((state, symbol))) is None:
            if not state:
                return 0
            state = self._fallback[state]
        return child

    @property
    def settled(self) -> int:
        """Symbols at the beginning that no later match can have a part of."""
        return self._length - self._depth[self._state]

    def push(self, symbols: Iterable[Hashable]) -> Match | None:
        """Take symbols, and give the least match that ends in them."""
        least = None
        for symbol in symbols:
            self._state = self._follow(self._state, symbol)
            self._length += 1
            index = self._longest[self._state]
            if index is not None:
                match = Match(self._length - self._lengths[index], self._length, index)
                least = match if least is None else min(least, match)
        return least
