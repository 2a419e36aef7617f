"""A block and what it holds, and the blocks of a sequence.

A model whose layers have different windows, or a window and none, has several block tables: a sequence has a block of
each for every so many tokens, and gives those of a table back that are behind its window. What a list has for each
block of a sequence, it has in this order: of the first ``tokens_per_block`` tokens for each table, then of the next.
"""

from __future__ import annotations

import hashlib
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np


@dataclass(slots=True)
class Block:
    """A block's owners and, once its content is known, what finds it.

    Attributes
    ----------
    ref_count : int
        Sequences that hold it.
    key : bytes or None
        Digest of all tokens up to its end, of a full block, and of its table.
    parent : bytes or None
        Digest of all tokens before it; None while nobody can find it.
    tokens : numpy.ndarray
        int32, its own tokens: all of them, or the leading ones of a sequence's last block.
    """

    ref_count: int = 0
    key: bytes | None = None
    parent: bytes | None = None
    tokens: np.ndarray = field(default_factory=lambda: np.empty(0, np.int32))


class Content(NamedTuple):
    """What a block holds, wherever it lies.

    Attributes
    ----------
    key, parent : bytes
        Digests of all tokens up to its end, and before it. Of a tail, which is not full, see :func:`tail_key`.
    tokens : sequence of int
        Its own.
    """

    key: bytes
    parent: bytes
    tokens: Sequence[int] | np.ndarray


@dataclass(slots=True)
class BlockTable:
    """The blocks of one sequence, in order.

    Attributes
    ----------
    blocks : list of int
        Of a table whose leading blocks have been given back, they are anyone's.
    num_registered : int
        How many leading blocks of each table others can find.
    keys : list of bytes
        Keys of the leading full blocks.
    digest : hashlib hash or None
        Over the cache salt and the tokens that ``keys`` cover; None where nothing is to be found.
    root : bytes
        Digest of the salt: what is found before the first block.
    partial : (list of int, int) or None
        For each table the block whose first rows continue the sequence, and how many rows, when it was opened.
    dropped : list of int
        Leading blocks of each table that it does not hold.
    next_drop : int
        Tokens that must be computed before it has more to give back, blocks or the promise of some.
    due : int
        Tokens that must be computed before it has blocks to give back or that others are to find.
    promise : (int, int)
        Until how many tokens are computed it is promised as many blocks in all.
    promised : int
        How many of these it does not hold yet.
    fetched : list of int or None
        Blocks that are held for the sequence since they came from the host; None while that is still to be asked.
    sought : bool
        Whether the disk has been asked for them.
    """

    blocks: list[int] = field(default_factory=list)
    num_registered: int = 0
    keys: list[bytes] = field(default_factory=list)
    digest: Any = None
    root: bytes = b""
    partial: tuple[list[int], int] | None = None
    dropped: list[int] = field(default_factory=list)
    next_drop: int = sys.maxsize
    due: int = 0
    promise: tuple[int, int] = (0, 0)
    promised: int = 0
    fetched: list[int] | None = None
    sought: bool = False


def tail_key(parent: bytes, tokens: np.ndarray) -> bytes:
    """The name of a sequence's last block, which is not full: no sequence looks for it but by its parent."""
    return hashlib.sha256(b"tail" + parent + tokens.tobytes()).digest()


def of_table(key: bytes, table: int) -> bytes:
    """The name of a table's block among those of the same tokens."""
    return key[:-1] + bytes([key[-1] ^ table]) if table else key
