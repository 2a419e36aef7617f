"""A run of the executor that :mod:`executor_contract` plays, as a file: what it moves and feeds, and what is due."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
from executor_blocks import Copy

STEPS, TENSORS = "steps.json", "tensors.npz"


class RecordedStep(NamedTuple):
    """A step of a run.

    Attributes
    ----------
    copies : list of Copy
        To be made before.
    inputs : dict of numpy.ndarray
        Every tensor that is fed but the addresses of the pools.
    logits : numpy.ndarray
        float32 ``[B, vocab_size]``.
    slots : numpy.ndarray
        int32 ``[num_pools, num_tokens, 2]``: block, and row within it, where each token is written.
    rows : numpy.ndarray
        uint8 ``[num_tokens, num_layers, 2, num_kv_heads, row_bytes]``: what is written there.
    """

    copies: list[Copy]
    inputs: dict[str, np.ndarray]
    logits: np.ndarray
    slots: np.ndarray
    rows: np.ndarray


_RESULTS = ("logits", "slots", "rows")


def save(steps: Sequence[RecordedStep], pool_shapes: Sequence[dict[str, tuple[int, ...]]], folder: Path) -> None:
    arrays = {f"{i}.{name}": x for i, step in enumerate(steps) for name, x in step.inputs.items()}
    arrays |= {f"{i}.{name}": getattr(step, name) for i, step in enumerate(steps) for name in _RESULTS}
    described = {"pool_shapes": list(pool_shapes), "copies": [step.copies for step in steps]}
    (folder / STEPS).write_text(json.dumps(described), encoding="utf-8")
    np.savez_compressed(folder / TENSORS, **arrays)


def load(folder: Path) -> tuple[list[RecordedStep], list[dict[str, tuple[int, ...]]]]:
    """The steps, and of each pool the shapes of its memories."""
    described = json.loads((folder / STEPS).read_text(encoding="utf-8"))
    inputs: list[dict[str, np.ndarray]] = [{} for _ in described["copies"]]
    with np.load(folder / TENSORS) as tensors:
        for key in tensors.files:
            number, name = key.split(".", 1)
            inputs[int(number)][name] = tensors[key]
    steps = [
        RecordedStep([Copy(p, tuple(a), tuple(b), rows) for p, a, b, rows in copies], x, *map(x.pop, _RESULTS))
        for copies, x in zip(described["copies"], inputs, strict=True)
    ]
    return steps, [{where: tuple(shape) for where, shape in pool.items()} for pool in described["pool_shapes"]]
