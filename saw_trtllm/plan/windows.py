"""Which layers share a block table, so that sliding windows bound what a sequence holds."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from saw_trtllm.engine.config import EngineConfig

#: Block tables of an engine: each is packed and sent to the GPU in every step.
MAX_TABLES = 8
#: Of a sequence's bytes, what a table more must save.
_LEAST_GAIN = 0.02


def layer_groups(config: EngineConfig) -> list[list[int]]:
    """The layers of each block table, for ``kv_groups`` of an engine's configuration.

    A block is given to any table, so all groups should be of as many layers: layers of one window are cut into groups
    of at most so many, and the number is taken that makes a sequence of ``max_seq_len`` smallest.

    Parameters
    ----------
    config : EngineConfig
        Whose layers have one table yet.

    Returns
    -------
    list of list of int
        Empty if no window is below ``max_seq_len``.
    """
    layers = range(config.pretrained_config.num_hidden_layers)
    windows: dict[int | None, list[int]] = {}
    for layer in layers:
        windows.setdefault(config.window(layer), []).append(layer)
    if list(windows) == [None]:
        return []
    by_format = [pool.layers for pool in config.pools]
    best: list[list[int]] = []
    least = float(_sequence_bytes(config, best))
    for most in range(1, len(layers) + 1):
        groups = [group for found in windows.values() for group in _cut(found, most, by_format)]
        size = _sequence_bytes(config, groups) * (1 + _LEAST_GAIN * (len(groups) - 1))
        if len(groups) <= MAX_TABLES and size < least:
            best, least = groups, size
    return best


def _cut(layers: Sequence[int], most: int, by_format: Sequence[Sequence[int]]) -> list[list[int]]:
    """Groups of at most ``most`` layers, as even as may be in each format, since a block has room for the most."""
    count = -(-len(layers) // most)
    groups: list[list[int]] = [[] for _ in range(count)]
    for place, same in enumerate(by_format):
        parts = np.array_split([i for i in layers if i in same], count)
        for group, part in zip(groups, parts if place % 2 == 0 else reversed(parts), strict=True):
            group += [int(i) for i in part]
    return [sorted(group) for group in groups]


def _sequence_bytes(config: EngineConfig, groups: list[list[int]]) -> int:
    saw = config.saw_int4.model_copy(update={"kv_groups": groups})
    grouped = config.model_copy(update={"saw_int4": saw})
    return grouped.sequence_bytes(config.build_config.max_seq_len)
