"""The blocks of the KV pool: reference counts, prefix reuse, eviction."""

from __future__ import annotations

import hashlib
from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from itertools import islice
from typing import Any, NamedTuple

import numpy as np

#: Blocks that continue one prefix and are compared with a prompt that does too, the latest first: work must be bounded
#: where thousands of prompts part at one place.
MAX_CANDIDATES = 16


@dataclass(slots=True)
class Block:
    """A block's owners and, once its content is known, what finds it.

    Attributes
    ----------
    ref_count : int
        Sequences that hold it.
    key : bytes or None
        Digest of all tokens up to its end, of a full block.
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
    """What a full block holds, wherever it lies.

    Attributes
    ----------
    key, parent : bytes
        Digests of all tokens up to its end, and before it.
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
    num_registered : int
        How many leading blocks others can find.
    keys : list of bytes
        Keys of the leading full blocks.
    digest : hashlib hash or None
        Over the cache salt and the tokens that ``keys`` cover; None where nothing is to be found.
    root : bytes
        Digest of the salt: what is found before the first block.
    partial : (int, int) or None
        The block whose first rows continue the sequence, and how many rows, when it was opened.
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
    partial: tuple[int, int] | None = None
    fetched: list[int] | None = None
    sought: bool = False


class BlockManager:
    """Hands out blocks, and finds those that already hold a sequence's beginning.

    A block is free when no sequence holds it. A free block that can be found keeps its content until it is needed for
    something else: the least recently freed goes first.

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

    Attributes
    ----------
    num_evicted : int
        Full blocks that could be found and were taken for something else.
    adopt : callable or None
        Asked with the index of a full block that can be found, and with it, when its last owner lets go of it; where it
        returns true, the caller is its owner until it is released.
    """

    def __init__(
        self,
        num_blocks: int,
        tokens_per_block: int,
        enable_block_reuse: bool = True,
        enable_partial_reuse: bool = True,
        reuse_multiple: int = 1,
    ) -> None:
        self.tokens_per_block = tokens_per_block
        self.enable_block_reuse = enable_block_reuse
        self.num_evicted = 0
        self.adopt: Callable[[int, Content], bool] | None = None
        self._grain = max(reuse_multiple, 1 if enable_partial_reuse else tokens_per_block)
        self._blocks = [Block() for _ in range(num_blocks)]
        self._free: OrderedDict[int, None] = OrderedDict.fromkeys(range(num_blocks))
        self._by_key: dict[bytes, int] = {}
        self._continuations: dict[bytes, dict[int, None]] = {}  # by their parents

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
        if not (self.enable_block_reuse and reuse):
            return 0
        self.name(table, tokens, salt)  # a sequence that waits is opened at every step, and has its keys
        hits = 0
        while hits < len(table.keys) and table.keys[hits] in self._by_key:
            hits += 1
        source, rows = self._partial_match(table, hits, tokens)
        num_tokens = min(hits * self.tokens_per_block + rows, len(tokens) - 1)
        num_tokens -= num_tokens % self._grain
        full, rows = divmod(num_tokens, self.tokens_per_block)
        if rows:
            table.partial = (self._by_key[table.keys[full]] if full < hits else source, rows)
        table.blocks += map(self.hold, table.keys[:full])
        table.num_registered = full
        return num_tokens

    def name(self, table: BlockTable, tokens: Sequence[int], salt: str = "") -> None:
        """Work out the keys of a sequence's full blocks, as :meth:`open` does, in any thread before it is queued."""
        if self.enable_block_reuse:
            if table.digest is None:
                table.digest = hashlib.sha256(salt.encode())
                table.root = table.digest.digest()
            self._extend(table, tokens)

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
        table.blocks += self.take(missing)
        return True

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

    def publish(self, index: int, content: Content) -> None:
        """Let others find a block that has been given a full block's content."""
        if content.key not in self._by_key:
            self._blocks[index].key = content.key
            self._by_key[content.key] = index
            self._continue(index, content.parent, content.tokens)

    def forget(self) -> None:
        """Let nobody find any block: what all of them hold is lost. Their owners keep them."""
        for index in range(self.num_blocks):
            self._forget(index)

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
            self.publish(table.blocks[i], Content(table.keys[i], self._parent(table, i), own))
            table.num_registered = i + 1

    def register_tail(self, table: BlockTable, tokens: Sequence[int]) -> None:
        """Let others find the rows of ``tokens`` that do not fill a block, when the sequence is about to be closed."""
        full, rows = divmod(len(tokens), self.tokens_per_block)
        # A match that ends within a block is what finds them.
        if table.digest is None or rows < self._grain or full > len(table.keys):
            return
        self._continue(table.blocks[full], self._parent(table, full), tokens[full * self.tokens_per_block :])

    def close(self, table: BlockTable) -> None:
        """Give a sequence's blocks back. The last are evicted first: a prefix outlives its continuations.

        Raises
        ------
        RuntimeError
            If a block has no owner: it has already been given back.
        """
        for index in reversed(table.blocks):
            self.release(index)
        table.blocks = []  # a new list: whoever keeps the old one's content must not take it for this
        table.num_registered, table.partial = 0, None

    def release(self, index: int) -> None:
        """Give a block back.

        Raises
        ------
        RuntimeError
            If it has no owner: it has already been given back.
        """
        block = self._blocks[index]
        if block.ref_count < 1:
            raise RuntimeError(f"block {index} is given back and has no owner")
        if block.ref_count == 1 and self._adopted(index, block):
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

    def _extend(self, table: BlockTable, tokens: Sequence[int] | np.ndarray, start: int = 0) -> None:
        """Keys of all full blocks, each a digest over the salt and all tokens up to its end."""
        size = self.tokens_per_block
        known, full = len(table.keys), (start + len(tokens)) // size
        if known < full:
            new = tokens[known * size - start : full * size - start]
            for block in np.asarray(new, dtype=np.int32).reshape(-1, size):
                table.digest.update(block.tobytes())
                table.keys.append(table.digest.digest())

    def _parent(self, table: BlockTable, i: int) -> bytes:
        """What is found before a sequence's block ``i``: for the first one, the salt."""
        return table.keys[i - 1] if i else table.root

    def _partial_match(self, table: BlockTable, hits: int, tokens: Sequence[int]) -> tuple[int, int]:
        """The block that continues ``hits`` blocks for longest as ``tokens`` do, and for how many rows."""
        best = (-1, 0)
        if self._grain < self.tokens_per_block:
            start = hits * self.tokens_per_block
            due = np.asarray(tokens[start : start + self.tokens_per_block], dtype=np.int32)
            candidates = self._continuations.get(self._parent(table, hits), {})
            for index in islice(reversed(candidates), MAX_CANDIDATES):
                rows = _common_prefix(self._blocks[index].tokens, due)
                if rows > best[1]:
                    best = (index, rows)
        return best

    def _adopted(self, index: int, block: Block) -> bool:
        if block.key is None or block.parent is None or self.adopt is None:
            return False
        return self.adopt(index, Content(block.key, block.parent, block.tokens))

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


def _common_prefix(a: np.ndarray, b: np.ndarray) -> int:
    """How many leading tokens two arrays have in common."""
    n = min(len(a), len(b))
    different = np.flatnonzero(a[:n] != b[:n])
    return int(different[0]) if len(different) else n
