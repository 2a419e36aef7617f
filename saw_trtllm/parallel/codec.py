"""A step on its way to the ranks: its arrays in one buffer, and of what the ranks know already only what is new."""

from __future__ import annotations

import pickle
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from saw_trtllm.engine.step import RowCopy, StepInputs
from saw_trtllm.runtime.sampling import SamplingState
from saw_trtllm.runtime.sampling_params import SamplingParams


class Step(NamedTuple):
    """The arguments of :meth:`saw_trtllm.runtime.executor.Executor.launch`."""

    inputs: StepInputs
    sampling: list[SamplingState | None]
    context_logits: list[bool]


class _Text(NamedTuple):
    """What both ends know of a sequence: how it draws, and its tokens where that depends on them."""

    params: SamplingParams
    prompt: list[int]
    generated: list[int]


class StepEncoder:
    """Packs steps for a :class:`StepDecoder`, which must be given each of them in this order.

    Parameters
    ----------
    num_layers : int
        Layers of the first pool.
    """

    def __init__(self, num_layers: int) -> None:
        self._per_block = 2 * num_layers
        self._offsets = np.zeros((0, 0), np.int32)  # as the ranks have them, of the first pool's keys
        self._texts: dict[int, tuple[int, Sequence[int], int]] = {}  # key, text and how much of it was sent, by its id
        self._num_texts = 0

    def encode(
        self, step: StepInputs, sampling: Sequence[SamplingState | None], context_logits: Sequence[bool]
    ) -> tuple[bytes, bytes]:
        """A header, and the step's int32 arrays one after the other."""
        offsets = step.kv_cache_block_offsets[0, :, 0]
        count, width = offsets.shape
        self._offsets = _widened(self._offsets, count, width)
        known = self._offsets[:count, :width]
        places = np.flatnonzero(offsets != known).astype(np.int32)
        blocks = offsets.reshape(-1)[places] // self._per_block
        known[:] = offsets
        keys, draws, more = self._states(sampling)
        parts = (
            *(step.input_ids, step.position_ids, step.last_token_ids, step.sequence_length),
            *(step.context_lengths, step.host_request_types, keys, draws, places, blocks),
        )
        logits = [i for i, wanted in enumerate(context_logits) if wanted]
        sizes = (len(step.input_ids), count, width, len(places))
        header = (sizes, [tuple(copy) for copy in step.copies], logits, more)
        return pickle.dumps(header, 5), np.concatenate(parts, dtype=np.int32).tobytes()

    def _states(self, sampling: Sequence[SamplingState | None]) -> tuple[list[int], list[int], dict[int, Any]]:
        """The key and the number of each draw, -1 where there is none, and what else some of them need."""
        keys, draws, more, kept = [], [], {}, {}
        for i, state in enumerate(sampling):
            if state is None:
                keys.append(-1)
                draws.append(-1)
                continue
            text = id(state.generated)
            key, _, sent = self._texts.get(text, (-1, (), 0))
            new = None
            if key < 0:
                key, self._num_texts = self._num_texts, self._num_texts + 1
                new = (state.params, list(state.prompt) if state.params.penalizes else [])
            tokens = list(state.generated[sent:]) if state.params.penalizes else []
            kept[text] = (key, state.generated, sent + len(tokens))
            keys.append(key)
            draws.append(state.draw)
            if new or tokens or state.banned or state.mask is not None:
                more[i] = (new, tokens, tuple(state.banned), state.mask)
        self._texts = kept
        return keys, draws, more


class StepDecoder:
    """Unpacks what a :class:`StepEncoder` packed.

    Parameters
    ----------
    num_layers : sequence of int
        Layers of each pool.
    """

    def __init__(self, num_layers: Sequence[int]) -> None:
        self._per_block = 2 * np.array(num_layers, np.int32)[:, None, None, None]
        self._blocks = np.zeros((0, 0), np.int32)
        self._texts: dict[int, _Text] = {}

    def decode(self, header: bytes, arrays: bytes) -> Step:
        """The step; its arrays are its own."""
        (num_tokens, count, width, changed), copies, logits, more = pickle.loads(header)
        sizes = (num_tokens, num_tokens, *[count] * 6, changed, changed)
        parts = np.split(np.frombuffer(bytearray(arrays), np.int32), np.cumsum(sizes[:-1]))
        ids, positions, ends, lengths, contexts, kinds, keys, draws, places, blocks = parts
        self._blocks = _widened(self._blocks, count, width)
        table = self._blocks[:count, :width]
        table[np.unravel_index(places, table.shape)] = blocks
        offsets = np.empty((len(self._per_block), count, 2, width), np.int32)
        np.multiply(table[:, None], self._per_block, out=offsets)
        offsets[:, :, 1] += 1
        rows = [RowCopy(*copy) for copy in copies]
        inputs = StepInputs(ids, positions, ends, lengths, contexts, kinds, offsets, rows)
        sampling = self._states(keys.tolist(), draws.tolist(), more)
        wanted = set(logits)
        return Step(inputs, sampling, [i in wanted for i in range(count)])

    def _states(self, keys: list[int], draws: list[int], more: dict[int, Any]) -> list[SamplingState | None]:
        states: list[SamplingState | None] = []
        kept = {}
        for i, (key, draw) in enumerate(zip(keys, draws, strict=True)):
            if key < 0:
                states.append(None)
                continue
            new, tokens, banned, mask = more.get(i, (None, (), (), None))
            text = kept[key] = _Text(new[0], new[1], []) if new else self._texts[key]
            text.generated.extend(tokens)
            states.append(SamplingState(text.params, text.prompt, text.generated, banned, draw, mask))
        self._texts = kept
        return states


def _widened(table: np.ndarray, rows: int, columns: int) -> np.ndarray:
    """A table with room for so many rows and columns, the old ones in their places."""
    if rows <= table.shape[0] and columns <= table.shape[1]:
        return table
    wider = np.zeros((max(rows, table.shape[0]), max(columns + 16, table.shape[1])), np.int32)
    wider[: table.shape[0], : table.shape[1]] = table
    return wider
