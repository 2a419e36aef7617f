"""A run of the executor that :mod:`executor_contract` plays, as a file: what it moves and feeds, and the logits due."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
from executor_contract import Copy

STEPS, TENSORS = "steps.json", "tensors.npz"


class RecordedStep(NamedTuple):
    """Copies before the step, every tensor that is fed but the pools' addresses, and logits ``[B, vocab_size]``."""

    copies: list[Copy]
    inputs: dict[str, np.ndarray]
    logits: np.ndarray


def save(steps: Sequence[RecordedStep], pool_shapes: dict[str, tuple[int, ...]], folder: Path) -> None:
    arrays = {f"{i}.{name}": x for i, step in enumerate(steps) for name, x in step.inputs.items()}
    arrays |= {f"{i}.logits": step.logits for i, step in enumerate(steps)}
    described = {"pool_shapes": pool_shapes, "copies": [step.copies for step in steps]}
    (folder / STEPS).write_text(json.dumps(described), encoding="utf-8")
    np.savez_compressed(folder / TENSORS, **arrays)


def load(folder: Path) -> tuple[list[RecordedStep], dict[str, tuple[int, ...]]]:
    """The steps, and the shape of each of a pool's memories."""
    described = json.loads((folder / STEPS).read_text(encoding="utf-8"))
    inputs: list[dict[str, np.ndarray]] = [{} for _ in described["copies"]]
    with np.load(folder / TENSORS) as tensors:
        for key in tensors.files:
            number, name = key.split(".", 1)
            inputs[int(number)][name] = tensors[key]
    steps = [
        RecordedStep([Copy(p, tuple(a), tuple(b), rows) for p, a, b, rows in copies], x, x.pop("logits"))
        for copies, x in zip(described["copies"], inputs, strict=True)
    ]
    return steps, {where: tuple(shape) for where, shape in described["pool_shapes"].items()}
