"""A step on its way to the ranks: its arrays in one buffer, and of what the ranks know already only what is new."""

from __future__ import annotations

import pickle
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from saw_trtllm.engine.step import PoolLayout, RowCopy, StepInputs
from saw_trtllm.runtime.sampling import SamplingState
from saw_trtllm.runtime.sampling_params import SamplingParams

#: Numbers at the beginning of a message, all of int32: tokens, sequences, blocks of the longest table, table entries
#: that are new, and whether something follows the arrays.
_SIZES = 5
#: Of a sequence: how it begins, new tokens of its text, banned tokens and mask.
_NOTHING_MORE: tuple[Any, ...] = (None, (), (), None)


class Step(NamedTuple):
    """The arguments of :meth:`saw_trtllm.runtime.executor.Executor.launch`."""

    inputs: StepInputs
    sampling: list[SamplingState | None] | None
    context_logits: list[bool]


class _Sent:
    """What the ranks have been told of a sequence: the key of its text, and how many of its tokens."""

    __slots__ = ("generated", "key", "num_tokens", "penalizes")

    def __init__(self, key: int, generated: Sequence[int], penalizes: bool) -> None:
        self.key, self.generated, self.penalizes = key, generated, penalizes
        self.num_tokens = 0


class _Text(NamedTuple):
    """What both ends know of a sequence: how it draws, and its tokens where that depends on them."""

    params: SamplingParams
    prompt: list[int]
    generated: list[int]


class StepEncoder:
    """Packs steps for a :class:`StepDecoder`, which must be given each of them in this order.

    Parameters
    ----------
    layout : PoolLayout
    """

    def __init__(self, layout: PoolLayout) -> None:
        self._pools = layout.first_pools
        self._per_block = layout.per_block[self._pools]
        # As the ranks have them, of the keys of each table's first pool, in the order of the table's entries.
        self._offsets = np.zeros((0, 0), np.int32)
        self._texts: dict[int, _Sent] = {}  # by the text's id
        self._num_texts = 0

    def encode(
        self, step: StepInputs, sampling: Sequence[SamplingState | None] | None, context_logits: Sequence[bool]
    ) -> bytes:
        """Sizes, the step's int32 arrays one after the other, and what only few steps have."""
        offsets = step.kv_cache_block_offsets[self._pools, :, 0].transpose(1, 2, 0)
        offsets = offsets.reshape(len(offsets), -1)
        count, width = offsets.shape
        self._offsets = _widened(self._offsets, count, width)
        known = self._offsets[:count, :width]
        places = np.flatnonzero(offsets != known)
        blocks = offsets.reshape(-1)[places] // self._per_block[places % width % len(self._pools)]
        known[:] = offsets
        keys = draws = [-1] * count
        more: dict[int, Any] | None = None  # the draws come by themselves
        if sampling is not None:
            keys, draws, more = self._states(sampling)
        rest = b""
        if more != {} or step.copies or True in context_logits:
            logits = [i for i, wanted in enumerate(context_logits) if wanted]
            rest = pickle.dumps(([tuple(copy) for copy in step.copies], logits, more), 5)
        sizes = (len(step.input_ids), count, width, len(places), len(rest))
        parts = (
            *(sizes, step.input_ids, step.position_ids, step.last_token_ids, step.sequence_length),
            *(step.context_lengths, step.host_request_types, keys, draws, places, blocks),
        )
        return np.concatenate(parts, dtype=np.int32, casting="unsafe").tobytes() + rest

    def encode_draws(self, sampling: Sequence[SamplingState | None]) -> bytes:
        """Those of the last step, which was sent without."""
        return pickle.dumps(self._states(sampling), 5)

    def _states(self, sampling: Sequence[SamplingState | None]) -> tuple[list[int], list[int], dict[int, Any]]:
        """The key and the number of each draw, -1 where there is none, and what else some of them need."""
        keys, draws, more, kept = [], [], {}, {}
        for i, state in enumerate(sampling):
            if state is None:
                keys.append(-1)
                draws.append(-1)
                continue
            params, prompt, generated, banned, number, mask = state
            text = id(generated)
            new, tokens = None, []
            if (sent := self._texts.get(text)) is None:
                sent = _Sent(self._num_texts, generated, params.penalizes)
                self._num_texts += 1
                new = (params, list(prompt) if sent.penalizes else [])
            kept[text] = sent
            keys.append(sent.key)
            draws.append(len(generated) if number is None else number)
            if sent.penalizes:
                tokens = list(generated[sent.num_tokens :])
                sent.num_tokens += len(tokens)
            if new or tokens or banned or mask is not None:
                more[i] = (new, tokens, tuple(banned), mask)
        self._texts = kept
        return keys, draws, more


class StepDecoder:
    """Unpacks what a :class:`StepEncoder` packed.

    Parameters
    ----------
    layout : PoolLayout
    """

    def __init__(self, layout: PoolLayout) -> None:
        self._layout = layout
        self._blocks = np.zeros((0, 0), np.int32)
        self._texts: dict[int, _Text] = {}

    def decode(self, message: bytes | bytearray) -> Step:
        """The step. Of a bytearray its arrays are views, and may be written."""
        num_tokens, count, width, changed, more_bytes = np.frombuffer(message, np.int32, _SIZES).tolist()
        end, parts = 4 * _SIZES, []
        for size in (num_tokens, num_tokens, count, count, count, count, count, count, changed, changed):
            parts.append(np.frombuffer(message, np.int32, size, end))
            end += 4 * size
        ids, positions, ends, lengths, contexts, kinds, keys, draws, places, blocks = parts
        copies, logits, more = pickle.loads(memoryview(message)[end:]) if more_bytes else ((), (), {})
        self._blocks = _widened(self._blocks, count, width)
        table = self._blocks[:count, :width]
        table[places // width, places % width] = blocks
        offsets = self._layout.offsets(table)
        rows = [RowCopy(*copy) for copy in copies]
        inputs = StepInputs(ids, positions, ends, lengths, contexts, kinds, offsets, rows)
        wanted = [False] * count
        for i in logits:
            wanted[i] = True
        sampling = None if more is None else self._states(keys.tolist(), draws.tolist(), more)
        return Step(inputs, sampling, wanted)

    def decode_draws(self, message: bytes | bytearray) -> list[SamplingState | None]:
        """What :meth:`StepEncoder.encode_draws` packed."""
        return self._states(*pickle.loads(message))

    def _states(self, keys: list[int], draws: list[int], more: dict[int, Any]) -> list[SamplingState | None]:
        states: list[SamplingState | None] = []
        kept = {}
        for i, (key, draw) in enumerate(zip(keys, draws, strict=True)):
            if key < 0:
                states.append(None)
                continue
            new, tokens, banned, mask = more.get(i, _NOTHING_MORE)
            text = kept[key] = _Text(new[0], new[1], []) if new else self._texts[key]
            if tokens:
                text.generated.extend(tokens)
            states.append(SamplingState(*text, banned, draw, mask))
        self._texts = kept
        return states


def _widened(table: np.ndarray, rows: int, columns: int) -> np.ndarray:
    """A table with room for so many rows and columns, the old ones in their places."""
    if rows <= table.shape[0] and columns <= table.shape[1]:
        return table
    wider = np.zeros((max(rows, table.shape[0]), max(columns + 16, table.shape[1])), np.int32)
    wider[: table.shape[0], : table.shape[1]] = table
    return wider
