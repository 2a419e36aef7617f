"""The pools of an engine's cache, and the memory that they share."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from saw_trtllm.format import KVFormat


class Pool(NamedTuple):
    """Layers whose rows have one format and one block table, and lie in a block in this order.

    Attributes
    ----------
    format : KVFormat
    layers : sequence of int
    table : int
        Their block table.
    region : int
        The memory that they lie in, which they share with the pools of the same format of other tables: a block is
        given to one table or to another.
    """

    format: KVFormat
    layers: Sequence[int]
    table: int = 0
    region: int = 0


class Region(NamedTuple):
    """Memory of blocks: rows of one format, of so many layers each."""

    format: KVFormat
    num_layers: int


def regions_of(pools: Sequence[Pool]) -> list[Region]:
    """The regions that pools lie in."""
    most: dict[int, Region] = {}
    for pool in pools:
        known = most.get(pool.region, Region(pool.format, 0))
        most[pool.region] = Region(pool.format, max(known.num_layers, len(pool.layers)))
    return [most[i] for i in sorted(most)]
