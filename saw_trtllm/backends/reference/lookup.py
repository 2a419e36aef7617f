"""Rows of an embedding in plain PyTorch."""

from __future__ import annotations

import torch


def lookup(table: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
    """``table[rows]``, or zeros where the table has no such row.

    Parameters
    ----------
    table : torch.Tensor
        ``[num_rows, width]``.
    rows : torch.Tensor
        int64 ``[...]``.

    Returns
    -------
    torch.Tensor
        ``[..., width]``.
    """
    there = (rows >= 0) & (rows < len(table))
    found = table[torch.where(there, rows, 0)]
    return torch.where(there[..., None], found, 0)
