"""A run of the executor that :mod:`executor_contract` plays, as a file: what it moves and feeds, and what is due."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from tests.support.executor.blocks import Copy

STEPS, TENSORS = "steps.json", "tensors.npz"
#: Each step from the rows of the reference, or from those that were computed before.
STEP_BY_STEP, ON_ITS_OWN = MODES = "step by step", "on its own"


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


class Accuracy(NamedTuple):
    """How near a run's logits are: the error of each row over the row's spread, the largest and the median; and how
    many of the rows have another largest logit."""

    largest: float
    median: float
    other_tokens: int

    @classmethod
    def of(cls, steps: Sequence[RecordedStep], logits: Sequence[np.ndarray]) -> Accuracy:
        found, due = np.concatenate(logits), np.concatenate([step.logits for step in steps])
        errors = np.abs(found - due).max(axis=1) / due.std(axis=1)
        return cls(float(errors.max()), float(np.median(errors)), int((found.argmax(1) != due.argmax(1)).sum()))


def save(
    steps: Sequence[RecordedStep],
    pool_shapes: Sequence[dict[str, tuple[int, ...]]],
    rounded: dict[str, Sequence[np.ndarray]],
    folder: Path,
) -> None:
    """Write a run; ``rounded`` has the logits of the same in 16 bits."""
    arrays = {f"{i}.{name}": x for i, step in enumerate(steps) for name, x in step.inputs.items()}
    arrays |= {f"{i}.{name}": getattr(step, name) for i, step in enumerate(steps) for name in _RESULTS}
    accuracy = {name: Accuracy.of(steps, logits) for name, logits in rounded.items()}
    described = {"pool_shapes": list(pool_shapes), "copies": [step.copies for step in steps], "accuracy": accuracy}
    (folder / STEPS).write_text(json.dumps(described), encoding="utf-8")
    np.savez_compressed(folder / TENSORS, **arrays)


def accuracy(folder: Path, mode: str) -> Accuracy:
    """That of the reference in 16 bits."""
    return Accuracy(*json.loads((folder / STEPS).read_text(encoding="utf-8"))["accuracy"][mode])


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
