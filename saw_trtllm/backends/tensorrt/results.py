"""What a step gives, on its way to the host."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import cast

import numpy as np

from saw_trtllm.backends.tensorrt.cuda import Event, PinnedBuffer, Stream
from saw_trtllm.backends.tensorrt.sampler import GpuSampler
from saw_trtllm.errors import KernelError
from saw_trtllm.runtime.executor import StepOutput
from saw_trtllm.runtime.sampling import SamplingState
from saw_trtllm.runtime.sampling_params import MAX_TOP_LOGPROBS

_FLOAT = np.dtype(np.float32).itemsize
#: Puts a step's draws on the stream, and what a slot takes of them; gives the rows of the logits that it takes.
Enqueue = Callable[["ResultSlot", Sequence[SamplingState | None]], list[slice | None]]


class ResultSlot:
    """Pinned memory for what one step gives.

    Parameters
    ----------
    max_sequences, vocab_size : int
    """

    def __init__(self, max_sequences: int, vocab_size: int) -> None:
        self._tokens = PinnedBuffer(max_sequences * 4)
        self._logprobs = PinnedBuffer(max_sequences * 8)
        # Grown where they are asked for, which is rare.
        self._logits, self._top = PinnedBuffer(0), PinnedBuffer(0)
        self._num_top: list[int] = []
        self._done = Event()
        self._vocab_size = vocab_size
        self._pending: PendingResult | None = None

    def begin(self, enqueue: Enqueue) -> PendingResult:
        """Be for a step, whose layers have been launched and whose draws ``enqueue`` puts after them."""
        if self._pending is not None:
            self._pending.finish()
        self._pending = PendingResult(self, enqueue)
        return self._pending

    def download(self, stream: Stream, sampler: GpuSampler, logits: int, spans: list[slice | None]) -> None:
        """Have a step's results copied here, after its last kernel.

        Parameters
        ----------
        stream : Stream
        sampler : GpuSampler
            Which has been launched.
        logits : int
            Address of the step's logits, fp32 ``[rows, vocab_size]``.
        spans : list of slice or None
            Rows of them that each sequence asks for.
        """
        n, row_bytes = len(spans), self._vocab_size * _FLOAT
        stream.download(self._tokens.address, sampler.tokens_ptr, n * 4)
        stream.download(self._logprobs.address, sampler.logprobs_ptr, n * 8)
        self._num_top = sampler.num_top
        if self._num_top:
            places = n * MAX_TOP_LOGPROBS
            self._top = self._top.grown(places * (8 + 4))
            stream.download(self._top.address, sampler.top_logprobs_ptr, places * 8)
            stream.download(self._top.address + places * 8, sampler.top_tokens_ptr, places * 4)
        rows = sum(span.stop - span.start for span in spans if span is not None)
        self._logits = self._logits.grown(rows * row_bytes)
        at = 0
        for span in spans:
            if span is not None:
                nbytes = (span.stop - span.start) * row_bytes
                stream.download(self._logits.address + at, logits + span.start * row_bytes, nbytes)
                at += nbytes
        self._done.record(stream)

    def read(self, spans: list[slice | None]) -> StepOutput:
        """Wait for the step, and copy its results out."""
        self._done.synchronize()
        n, at = len(spans), 0
        kept: list[np.ndarray | None] = [None] * n
        for i, span in enumerate(spans):
            if span is not None:
                shape = (span.stop - span.start, self._vocab_size)
                taken = kept[i] = self._logits.array(np.float32, shape, at).copy()
                at += taken.nbytes
        tokens, logprobs = self._tokens.array(np.int32, (n,)), self._logprobs.array(np.float64, (n,))
        return StepOutput(tokens.tolist(), logprobs.tolist(), kept, self._likeliest())

    def _likeliest(self) -> list[list[tuple[int, float]]]:
        shape = (len(self._num_top), MAX_TOP_LOGPROBS)
        logprobs = self._top.array(np.float64, shape)
        tokens = self._top.array(np.int32, shape, logprobs.nbytes)
        counts = [min(max(count, 0), self._vocab_size) for count in self._num_top]
        return [
            list(zip(tokens[i, :count].tolist(), logprobs[i, :count].tolist(), strict=True))
            for i, count in enumerate(counts)
        ]

    def close(self) -> None:
        """Free it."""
        for resource in (self._tokens, self._logprobs, self._logits, self._top, self._done):
            resource.close()


class PendingResult:
    """A step in flight; see :class:`saw_trtllm.runtime.executor.PendingStep`."""

    def __init__(self, slot: ResultSlot, enqueue: Enqueue) -> None:
        self._slot, self._enqueue = slot, enqueue
        self._spans: list[slice | None] = []
        self._output: StepOutput | Exception | None = None

    def draw(self, sampling: Sequence[SamplingState | None]) -> None:
        """Launch the draws. What this fails with the result raises."""
        try:
            self._spans = self._enqueue(self._slot, sampling)
        except Exception as e:
            self._output = e

    def finish(self) -> None:
        """Wait, and keep the result: its slot is needed."""
        if self._output is None:
            try:
                self._output = self._slot.read(self._spans)
            except KernelError as e:
                self._output = e

    def result(self) -> StepOutput:
        """Wait for the step, and give what it computed.

        Raises
        ------
        KernelError
            If the GPU failed.
        """
        self.finish()
        if isinstance(self._output, Exception):
            raise self._output
        return cast(StepOutput, self._output)
