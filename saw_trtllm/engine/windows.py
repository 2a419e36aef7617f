"""How many blocks of a sequence its layers still read: all of them, or with a sliding window the last ones."""

from __future__ import annotations

from collections.abc import Sequence

#: Tokens that a decoding sequence has in flight or scheduled beyond those that are known to be computed.
DECODES_AHEAD = 2


def first_block(num_tokens: int, window: int | None, tokens_per_block: int) -> int:
    """The first block that a query at position ``num_tokens``, or a later one, reads.

    Parameters
    ----------
    num_tokens : int
        Tokens before the query.
    window : int or None
        Keys that a query sees, its own among them; None for all.
    tokens_per_block : int
    """
    return 0 if window is None else max(0, num_tokens - window + 1) // tokens_per_block


def most_blocks(
    num_tokens: int, windows: Sequence[int | None], tokens_per_block: int, step: int = DECODES_AHEAD
) -> int:
    """Blocks that a sequence holds at most while it grows to ``num_tokens``.

    Parameters
    ----------
    num_tokens : int
    windows : sequence of int or None
        The window of each block table.
    tokens_per_block : int
    step : int
        Tokens that are computed before blocks are given back.
    """
    whole = -(-num_tokens // tokens_per_block)
    held = 0
    for window in windows:
        # Rows in a row lie in one block more than they fill, wherever they begin.
        held += whole if window is None else min(whole, (window + step - 3) // tokens_per_block + 2)
    return held
