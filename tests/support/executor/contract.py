"""Plays TensorRT-LLM's executor: which blocks it gives to whom, which it copies, and the tensors that it feeds.

After its sources ``transformerBuffers.cpp`` and ``runtimeBuffers.cpp``; :mod:`executor_blocks` has its blocks. Layers
with the same attention window share a manager of blocks and a pool. Nothing is computed here: a step says what is to be
copied and fed, and a test has both the kernels and the reference follow it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

from saw_trtllm.engine.step import DECODE, PREFILL, StepInputs, StepSequence
from tests.support.executor.blocks import PRIMARY, SECONDARY, Block, Copy, Manager

#: To which the executor rounds up the longest KV length before it captures a CUDA graph.
GRAPH_ROUNDING = 256

#: The longest sequence, which is the window of layers that see all.
ALL = 512
#: Runs for tests: windows of the layers, and tokens per block.
RUNS = {
    "one pool": ([ALL, ALL, ALL], 32),
    "two windows": ([ALL, 48, ALL, 48], 32),
    "small blocks": ([70, ALL, 70], 16),
    "large blocks": ([ALL, 100], 64),
}
NUM_STEPS = 40


@dataclass(eq=False)
class Request:
    """A sequence of the executor's."""

    tokens: list[int]
    prompt_len: int
    to_generate: int
    computed: int = 0
    #: Of each manager: its blocks, None where one left the window, and the index that stands in the table.
    blocks: list[list[Block | None]] = field(default_factory=list)
    tables: list[list[int]] = field(default_factory=list)

    @property
    def is_prefill(self) -> bool:
        return self.computed < self.prompt_len


@dataclass(frozen=True)
class Step:
    """What the executor does in an iteration.

    Attributes
    ----------
    copies : list of Copy
        To be made before, in order.
    sequences : list of list of StepSequence
        Of each pool: the sequences with their blocks of it.
    inputs : dict of numpy.ndarray
        Every tensor that it feeds to an engine, but for the addresses of the pools.
    """

    copies: list[Copy]
    sequences: list[list[StepSequence]]
    inputs: dict[str, np.ndarray]

    @property
    def num_tokens(self) -> int:
        return len(self.inputs["input_ids"])

    @property
    def graph_key(self) -> tuple[int, int] | None:
        """By which the executor finds a captured CUDA graph; None if the step has a prefill."""
        types = self.inputs["host_request_types"]
        longest = int(self.inputs["host_past_key_value_lengths"].max())
        return (len(types), -(-longest // GRAPH_ROUNDING)) if (types == DECODE).all() else None

    def for_capture(self, max_seq_len: int) -> dict[str, np.ndarray]:
        """The inputs while a graph is captured that serves later steps."""
        past = self.inputs["host_past_key_value_lengths"]
        rounded = min(max_seq_len - 1, -(-int(past.max()) // GRAPH_ROUNDING) * GRAPH_ROUNDING)
        return self.inputs | {"host_past_key_value_lengths": np.full_like(past, rounded)}

    def for_reference(self, pool: int, num_layers: int) -> StepInputs:
        return StepInputs.pack(self.sequences[pool], num_layers)


class Executor:
    """Random requests, some of which begin as others did, batched in flight.

    Parameters
    ----------
    windows : sequence of int
        Of each layer: tokens that it sees, ``max_seq_len`` for all.
    num_primary, num_secondary : int
        Blocks of each pool.
    tokens_per_block, max_batch_size, max_seq_len : int
    max_num_tokens : int
        Of a step, decodes and chunks together.
    seed : int
    """

    def __init__(
        self,
        windows: Sequence[int],
        *,
        num_primary: int,
        num_secondary: int,
        tokens_per_block: int,
        max_seq_len: int,
        max_batch_size: int = 6,
        max_num_tokens: int = 160,
        vocab_size: int = 200,
        seed: int = 0,
    ) -> None:
        self.windows, self.tokens_per_block, self.max_seq_len = list(windows), tokens_per_block, max_seq_len
        self.max_batch_size, self.max_num_tokens, self.vocab_size = max_batch_size, max_num_tokens, vocab_size
        self.num_blocks = {PRIMARY: num_primary, SECONDARY: num_secondary}
        sizes = sorted(set(windows))  # the executor keeps them in a std::map
        self.layers = [[i for i, w in enumerate(windows) if w == size] for size in sizes]
        self.managers = [Manager(p, size, tokens_per_block, num_primary, num_secondary) for p, size in enumerate(sizes)]
        self.mapping = np.zeros((len(windows), 2), np.int32)
        for pool, layers in enumerate(self.layers):
            for place, layer in enumerate(layers):
                self.mapping[layer] = pool, place
        self.max_blocks = -(-max_seq_len // tokens_per_block)
        #: Requests of the latest step, and how often one was paused.
        self.batch: list[Request] = []
        self.num_paused = 0
        self._rng = np.random.default_rng(seed)
        self._running: list[Request] = []
        self._waiting: list[Request] = []
        self._texts: list[list[int]] = []
        # One memory for all batch sizes, of which only the columns in use are sent to the GPU.
        shape = len(sizes) * max_batch_size * 2 * self.max_blocks
        self._offsets = {PRIMARY: np.zeros(shape, np.int32), "gpu": np.full(shape, -1, np.int32)}

    def step(self) -> Step:
        """Plan an iteration, as if the ones before had been computed."""
        copies: list[Copy] = []
        self._retire()
        self._pause_sometimes()
        self._admit(copies)
        prefills = [(r, n) for r, n in self._chunks() if n > 0]
        decodes = [r for r in self._running if not r.is_prefill]
        for request in decodes:
            request.tokens.append(int(self._rng.integers(self.vocab_size)))
            for manager, blocks, table in zip(self.managers, request.blocks, request.tables, strict=True):
                manager.grow(blocks, table, len(request.tokens), copies)
        if not prefills and not decodes:
            return self.step()
        batch = [*prefills, *((r, 1) for r in decodes)]
        self.batch = [r for r, _ in batch]
        step = Step(copies, self._sequences(batch), self._inputs(batch, len(prefills)))
        for request, count in batch:
            request.computed += count
        for request, _ in prefills:
            if not request.is_prefill:
                self._store(request, request.prompt_len, whole_only=True)
        return step

    # -- requests

    def _retire(self) -> None:
        for request in [r for r in self._running if len(r.tokens) >= r.prompt_len + r.to_generate]:
            self._store(request, request.computed, whole_only=False)
            self._texts = [*self._texts, request.tokens][-8:]
            self._release(request)

    def _pause_sometimes(self) -> None:
        """Take a sequence's blocks away; it comes again with what it has generated as part of its prompt."""
        victims = [r for r in self._running if not r.is_prefill]
        if victims and self._rng.random() < 0.06:
            request = victims[int(self._rng.integers(len(victims)))]
            self._release(request)
            self.num_paused += 1
            self._waiting.insert(0, Request(request.tokens, len(request.tokens), request.to_generate))

    def _admit(self, copies: list[Copy]) -> None:
        if not self._waiting and (self._rng.random() < 0.5 or not self._running):
            self._waiting.append(self._new_request())
        while self._waiting and len(self._running) < self.max_batch_size:
            request = self._waiting[0]
            # What it may need at most, and a block for each that decodes.
            need = -(-(request.prompt_len + request.to_generate) // self.tokens_per_block) + 2 + len(self._running)
            if min(m.num_free() for m in self.managers) < need:
                return
            self._waiting.pop(0)
            tokens = request.tokens
            reused = min(sum(rows for _, rows in m.matched(tokens)) for m in self.managers)
            request.computed = min(reused, len(tokens) - 1)
            request.blocks = [m.add(tokens, request.computed, copies) for m in self.managers]
            request.tables = [[b.place[1] for b in blocks] for blocks in request.blocks]
            self._running.append(request)

    def _new_request(self) -> Request:
        longest = self.max_seq_len * 2 // 5
        tokens = self._rng.integers(self.vocab_size, size=int(self._rng.integers(1, longest))).tolist()
        texts = [*self._texts, *(r.tokens for r in self._running)]
        if texts and self._rng.random() < 0.7:
            text = texts[int(self._rng.integers(len(texts)))]
            tokens = text[: int(self._rng.integers(1, min(len(text), longest) + 1))] + tokens[: longest // 4]
        return Request(tokens, len(tokens), int(self._rng.integers(1, longest // 8)))

    def _chunks(self) -> list[tuple[Request, int]]:
        """Chunks end at whole blocks unless they end the prompt."""
        left = self.max_num_tokens - sum(not r.is_prefill for r in self._running)
        chunks = []
        for request in (r for r in self._running if r.is_prefill):
            rest = request.prompt_len - request.computed
            count = rest if rest <= left else left // self.tokens_per_block * self.tokens_per_block
            left -= count
            chunks.append((request, count))
        return chunks

    def _store(self, request: Request, length: int, whole_only: bool) -> None:
        for manager, blocks in zip(self.managers, request.blocks, strict=True):
            manager.store(blocks, request.tokens[:length], whole_only)

    def _release(self, request: Request) -> None:
        self._running.remove(request)
        for manager, blocks in zip(self.managers, request.blocks, strict=True):
            manager.release(blocks)

    # -- tensors

    def _sequences(self, batch: Sequence[tuple[Request, int]]) -> list[list[StepSequence]]:
        return [
            [
                StepSequence(
                    r.tokens[r.computed : r.computed + count],
                    r.computed,
                    r.prompt_len,
                    PREFILL if r.is_prefill else DECODE,
                    list(r.tables[pool]),
                )
                for r, count in batch
            ]
            for pool in range(len(self.managers))
        ]

    def _inputs(self, batch: Sequence[tuple[Request, int]], num_prefills: int) -> dict[str, np.ndarray]:
        int32 = lambda values: np.array(list(values), np.int32)  # noqa: E731
        counts = [count for _, count in batch]
        lengths = [r.computed + count for r, count in batch]
        context = int32([*counts[:num_prefills], *(r.prompt_len for r, _ in batch[num_prefills:])])
        offsets = self._block_offsets([r for r, _ in batch])
        return {
            "input_ids": int32(t for r, n in batch for t in r.tokens[r.computed : r.computed + n]),
            "position_ids": int32(p for r, n in batch for p in range(r.computed, r.computed + n)),
            "last_token_ids": np.cumsum(counts, dtype=np.int32),
            "sequence_length": int32(lengths),
            "context_lengths": context,
            "host_context_lengths": context.copy(),
            "host_request_types": int32([PREFILL] * num_prefills + [DECODE] * (len(batch) - num_prefills)),
            "host_past_key_value_lengths": int32([*lengths[:num_prefills], *(n - 1 for n in lengths[num_prefills:])]),
            "host_max_attention_window_sizes": int32(self.windows),
            "host_sink_token_length": np.zeros(1, np.int32),
            "cache_indirection": np.zeros((len(batch), 1, self.max_seq_len), np.int32),
            "kv_cache_block_offsets": offsets["gpu"],
            "host_kv_cache_block_offsets": offsets[PRIMARY],
            "host_kv_cache_pool_mapping": self.mapping.copy(),
            "host_runtime_perf_knobs": np.zeros(16, np.int64),
            "host_context_progress": np.zeros(1, np.int64),
        }

    def _block_offsets(self, requests: Sequence[Request]) -> dict[str, np.ndarray]:
        """Tables as the executor's buffers hold them: after a sequence's own blocks, what was there before."""
        shape = len(self.managers), len(requests), 2, self.max_blocks
        host, gpu = (x[: np.prod(shape)].reshape(shape) for x in self._offsets.values())
        widest = 0
        for i, request in enumerate(requests):
            for pool, table in enumerate(request.tables):
                first = np.array(table, np.int32) * (2 * len(self.layers[pool]))
                host[pool, i, :, : len(table)] = first, first + 1
                widest = max(widest, len(table))
        gpu[..., :widest] = host[..., :widest]
        return {PRIMARY: host.copy(), "gpu": gpu.copy()}


def make_executor(run: str, seed: int) -> Executor:
    """The executor of one of RUNS: blocks are so few that requests wait for them and cached ones go to the host."""
    windows, tokens_per_block = RUNS[run]
    blocks = 28 * 32 // tokens_per_block
    return Executor(
        windows,
        num_primary=blocks,
        num_secondary=blocks // 2,
        tokens_per_block=tokens_per_block,
        max_seq_len=ALL,
        seed=seed,
    )
