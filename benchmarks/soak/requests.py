"""Requests through the engine's loop, its scheduler and its block manager, over an executor that may fail."""

from __future__ import annotations

import asyncio
import gc
import logging
import threading
import time
from collections import Counter
from collections.abc import Sequence
from functools import partial
from random import Random

from saw_trtllm import SamplingParams
from saw_trtllm.engine.step import PoolLayout, StepInputs, StepPacker
from saw_trtllm.errors import EngineError, QueueFullError
from saw_trtllm.runtime.block_manager import BlockManager
from saw_trtllm.runtime.detokenizer import Detokenizer
from saw_trtllm.runtime.engine_core import EngineCore
from saw_trtllm.runtime.executor import FinishedStep, StepOutput
from saw_trtllm.runtime.generation_result import GenerationResult
from saw_trtllm.runtime.output_queue import OutputQueue
from saw_trtllm.runtime.request import Request
from saw_trtllm.runtime.sampling import SamplingState
from saw_trtllm.runtime.scheduler import Scheduler
from saw_trtllm.runtime.sequence import Sequence as Scheduled

VOCAB, END_ID = 97, 5
MAX_PROMPT, MAX_TOKENS = 48, 24
#: Seconds after which a request counts as lost.
LIMIT = 120.0
_CLIENTS, _WINDOW, _REQUESTS_PER_ENGINE = 3, 24, 5000
_MODULUS = 2**31 - 1


def _row(before: int, token: int, position: int) -> int:
    return (before * 31 + token * 7 + position + 1) % _MODULUS


def expected_text(prompt: Sequence[int], max_tokens: int) -> list[int]:
    """The text of a prompt by the executor's model."""
    row, text = 0, []
    for position, token in enumerate(prompt):
        row = _row(row, token, position)
    while len(text) < max_tokens and row % VOCAB != END_ID:
        text.append(row % VOCAB)
        row = _row(row, text[-1], len(prompt) + len(text) - 1)
    return text


class _FailedStep(FinishedStep):
    def result(self) -> StepOutput:
        raise RuntimeError("injected at the result")


class FaultyExecutor:
    """A row of its pool is a hash of the row before it, found through the block table, and of its token.

    Steps that fail at their result leave rows that are wrong, which nobody may reuse.
    """

    def __init__(self, num_blocks: int, tokens_per_block: int, asynchronous: bool, failures: float, rng: Random):
        self.num_blocks, self.asynchronous = num_blocks, asynchronous
        self.injected = 0
        self._tokens_per_block, self._failures, self._rng = tokens_per_block, failures, rng
        self._rows = [0] * (num_blocks * tokens_per_block)
        self._last: list[int] = []

    def launch(
        self, step: StepInputs, sampling: Sequence[SamplingState | None] | None, context_logits: Sequence[bool]
    ) -> FinishedStep:
        """Compute a step's rows at once, or fail."""
        fault = self._rng.random() / self._failures if self._failures else 2.0
        if fault < 0.5:
            self.injected += 1
            raise RuntimeError("injected at the launch")
        wrong = int(fault < 1)
        ids, size = step.input_ids.tolist(), self._tokens_per_block
        for source, target, rows in step.copies:
            self._rows[target * size : target * size + rows] = self._rows[source * size : source * size + rows]
        rows_of, first = [], 0
        for i, end in enumerate(step.last_token_ids.tolist()):
            table = (step.kv_cache_block_offsets[0, i, 0] // 2).tolist()
            position = int(step.sequence_length[i]) - (end - first)
            row = self._rows[table[(position - 1) // size] * size + (position - 1) % size] if position else 0
            for token in ids[first:end]:
                row = _row(row, token if token >= 0 else self._last[-1 - token], position) ^ wrong
                self._rows[table[position // size] * size + position % size] = row
                position += 1
            rows_of.append(row)
            first = end
        self.injected += wrong
        return (_FailedStep if wrong else FinishedStep)(partial(self._draw, rows_of), sampling)

    def _draw(self, rows: list[int], sampling: Sequence[SamplingState | None]) -> StepOutput:
        drawn = [-1 if state is None else row % VOCAB for row, state in zip(rows, sampling, strict=True)]
        self._last = [max(token, 0) for token in drawn]
        return StepOutput(drawn, [0.0] * len(drawn), [None] * len(drawn))

    def shutdown(self) -> None:
        """Nothing is held."""


class _Client:
    """Sends requests from a thread of its own, and ends each in one of the ways in which clients do."""

    def __init__(self, core: EngineCore, scheduler: Scheduler, ids: range, rng: Random) -> None:
        self.counts: Counter[str] = Counter()
        self._core, self._scheduler, self._ids, self._rng = core, scheduler, iter(ids), rng
        self._stem = [1 + i % (VOCAB - 1) for i in range(MAX_PROMPT)]
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def join(self) -> None:
        self._thread.join()

    def _run(self) -> None:
        more = True
        while more:
            window = []
            for request_id in self._ids:
                window.append(self._send(request_id))
                if len(window) == _WINDOW:
                    break
            more = bool(window)
            for sent in window:
                if sent is not None:
                    self.counts[self._outcome(*sent)] += 1

    def _send(self, request_id: int) -> tuple[GenerationResult, list[int]] | None:
        rng = self._rng
        prompt = self._stem[: rng.choice((0, 8, 16, 40))] + [rng.randrange(VOCAB) for _ in range(rng.randrange(1, 9))]
        # The executor knows no penalties: a text with one is drawn later, and the same.
        penalty = rng.choice((0.0, 0.0, 0.0, 1.0))
        params = SamplingParams(max_tokens=rng.randrange(1, MAX_TOKENS + 1), presence_penalty=penalty)
        sequence = Scheduled(request_id, prompt, params)
        self._scheduler.check(sequence)
        detokenizer = Detokenizer(None, [], False)
        request = Request(sequence, None, {END_ID}, detokenizer, rng.random() < 0.3, OutputQueue())
        handle = GenerationResult(request_id, request.outputs, abort=lambda: self._core.abort(request_id))
        expected = expected_text(prompt, params.max_tokens)
        try:
            self._core.submit(request, wait=rng.random() < 0.8)
        except QueueFullError:
            self.counts["queue full"] += 1
            return None
        fate = rng.random()
        if fate < 0.1:
            handle.abort()
        elif fate < 0.2:  # the handle goes out of scope
            self.counts["dropped"] += 1
            return None
        elif fate < 0.22:
            return self._cancel_reader(handle, expected)
        return handle, expected

    def _cancel_reader(
        self, handle: GenerationResult, expected: list[int]
    ) -> tuple[GenerationResult, list[int]] | None:
        try:
            asyncio.run(asyncio.wait_for(handle.aresult(), self._rng.random() * 0.002))
        except TimeoutError:
            self.counts["readers cancelled"] += 1
            return None
        except EngineError:
            pass  # the handle says so again
        return handle, expected

    def _outcome(self, handle: GenerationResult, expected: list[int]) -> str:
        try:
            output = handle.result(LIMIT).outputs[0]
        except TimeoutError:
            return "LOST"
        except EngineError as e:
            return "failed" if "injected" in str(e) and "the runtime failed" not in str(e) else "LOST"
        if output.finish_reason == "cancelled":
            return "cancelled" if output.token_ids == expected[: len(output.token_ids)] else "WRONG"
        return "answered" if output.token_ids == expected else "WRONG"


def soak_requests(count: int, seed: int, failures: float = 0.01) -> Counter[str]:
    """Send ``count`` requests to engines of all kinds; keys of the result in capitals are losses.

    Parameters
    ----------
    count, seed : int
    failures : float
        Share of the steps that fail, half of them when they are launched and half at their result.
    """
    counts: Counter[str] = Counter()
    logging.getLogger("saw_trtllm.runtime.engine_core").setLevel(logging.CRITICAL)  # each failed step is an error there
    for number, start in enumerate(range(0, count, _REQUESTS_PER_ENGINE)):
        counts.update(_one_engine(range(start, min(start + _REQUESTS_PER_ENGINE, count)), number, seed, failures))
    return counts


def _one_engine(ids: range, number: int, seed: int, failures: float) -> Counter[str]:
    rng = Random(seed * 1000 + number)
    asynchronous, exact, reuse = number % 2 == 0, number % 4 < 2, number % 8 < 6
    size, chunk = rng.choice(((4, 8), (8, 8), (8, 16)))
    # Little more than what one sequence may need, so that sequences are preempted.
    num_blocks = -(-(MAX_PROMPT + MAX_TOKENS) // size) + rng.randrange(2, 30)
    executor = FaultyExecutor(num_blocks, size, asynchronous, failures, rng)
    blocks = BlockManager(num_blocks, size, reuse, number % 3 != 1, 1 if exact else chunk)
    scheduler = Scheduler(blocks, 16, 16 + 2 * chunk, chunk, exact)
    core = EngineCore(executor, scheduler, StepPacker(PoolLayout([1])), max_queue_size=32)
    clients = [_Client(core, scheduler, ids[i::_CLIENTS], Random(rng.random())) for i in range(_CLIENTS)]
    for client in clients:
        client.join()
    counts = sum((client.counts for client in clients), Counter())
    gc.collect()  # handles that cycles have kept
    end = time.monotonic() + LIMIT
    while (stats := core.stats()).used_blocks or stats.num_running or stats.num_waiting:
        if time.monotonic() > end:
            break
        time.sleep(0.01)
    core.shutdown()
    counts["LEAKED BLOCKS"] = stats.used_blocks
    counts["LEFT BEHIND"] = stats.num_running + stats.num_waiting
    counts["WRONG"] += 0  # it is printed
    counts["LOST"] += len(ids) - sum(counts[k] for k in _ENDS)
    counts["requests"], counts["engines"] = len(ids), 1
    counts["injected failures"], counts["preemptions"] = executor.injected, stats.preemptions_total
    blocks.check()
    return counts


_ENDS = ("answered", "failed", "cancelled", "queue full", "dropped", "readers cancelled", "LOST", "WRONG")
