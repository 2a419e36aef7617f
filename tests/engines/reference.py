"""What the reference makes of the cases, in a process of its own: it needs PyTorch.

python -m tests.engines.reference FOLDER NAME...      writes FOLDER/NAME/reference.npz
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from unittest import mock

import numpy as np
import torch

from saw_trtllm.backends.reference.cache import PagedCache
from saw_trtllm.backends.reference.int4 import TORCH_DTYPES
from saw_trtllm.backends.reference.model import ReferenceModel, calibrated_inputs, rms_norm
from saw_trtllm.plan.plan import BuildPlan
from tests.engines.cases import (
    NUM_BLOCKS,
    RANK_CASES,
    SERVED_CASES,
    STEP_CASES,
    STEPS,
    TEXT_BLOCKS,
    TEXT_TOKENS,
    TEXTS,
    TOKENS_PER_BLOCK,
    Case,
    pack,
    text_steps,
)

#: Logits that are kept of each token, the largest.
TOP = 16


def steps(case: Case, folder: Path) -> dict[str, np.ndarray]:
    """Logits of each step, and the pools after it."""
    plan = case.plan(folder, "reference")
    config = plan.config
    levers = calibrated_inputs(config, plan.weights.load)
    model = ReferenceModel(config.pretrained_config, plan.weights.load, config.build_config.max_seq_len, **levers)
    layout = config.pool_layout
    cache = PagedCache(
        config.pools, NUM_BLOCKS * layout.num_tables, config.pretrained_config.num_key_value_heads, TOKENS_PER_BLOCK
    )
    for pool in cache.pools:
        pool.data.zero_()
    found = {}
    for name in STEPS:
        step = pack(name, layout)
        found[f"{name}.logits"] = model.forward(
            step, cache, all_logits=config.build_config.gather_context_logits
        ).numpy()
        found |= {f"{name}.pool{i}": pool.data.numpy().copy() for i, pool in enumerate(cache.pools)}
    return found


def texts(case: Case, folder: Path) -> dict[str, np.ndarray]:
    """Greedy tokens, the largest logits that chose them, and what rounding to the engine's dtype makes of those."""
    plan = case.plan(folder, "reference")
    tokens, logits = greedy(plan)
    top = np.argsort(-logits, axis=2)[..., :TOP]
    values = np.take_along_axis(logits, top, axis=2)
    with rounded(TORCH_DTYPES[case.dtype]):
        _, coarse = greedy(plan, tokens)
    errors = np.abs(np.take_along_axis(coarse, top, axis=2) - values)
    differ = (coarse.argmax(axis=2) != tokens).mean()
    return {"tokens": tokens, "top": top, "values": values, "errors": errors, "rounded_differ": differ}


def greedy(plan: BuildPlan, forced: np.ndarray | None = None) -> tuple[np.ndarray, np.ndarray]:
    """Tokens ``[n, TEXT_TOKENS]`` after the prompts, and the logits of each; ``forced`` ones are not chosen."""
    config = plan.config
    model = ReferenceModel(config.pretrained_config, plan.weights.load, config.build_config.max_seq_len)
    layout = config.pool_layout
    blocks = TEXT_BLOCKS * TEXTS * layout.num_tables
    cache = PagedCache(config.pools, blocks, config.pretrained_config.num_key_value_heads, TOKENS_PER_BLOCK)
    tokens, logits = np.zeros((TEXTS, TEXT_TOKENS), np.int64), []
    for step in text_steps(layout, tokens if forced is None else forced):
        logits.append(model.forward(step, cache).numpy())
        tokens[:, len(logits) - 1] = logits[-1].argmax(axis=1)
    return tokens, np.stack(logits, axis=1)


@contextmanager
def rounded(dtype: torch.dtype) -> Iterator[None]:
    """Have the reference round whatever an engine keeps in 16 bits."""

    def halved(function: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
        return lambda *args, **kwargs: function(*args, **kwargs).to(dtype).float()

    activations = {name: halved(function) for name, function in ReferenceModel._activations.items()}
    norm = staticmethod(halved(rms_norm))
    with mock.patch.multiple(ReferenceModel, _activations=activations, _rms_norm=norm):
        yield


def main() -> None:
    """Compute the named cases that are not there."""
    folder, cases = Path(sys.argv[1]), {case.name: case for case in (*STEP_CASES, *RANK_CASES, *SERVED_CASES.values())}
    for name in sys.argv[2:]:
        path = folder / name / "reference.npz"
        if not path.is_file():
            found = texts(cases[name], folder) if cases[name].family == "example" else steps(cases[name], folder)
            path.parent.mkdir(parents=True, exist_ok=True)
            np.savez_compressed(path, **found)


if __name__ == "__main__":
    main()
