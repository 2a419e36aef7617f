"""The choice of a step's next tokens on the GPU, as :mod:`saw_trtllm.runtime.sampling` makes it on the CPU."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from saw_trtllm.backends.tensorrt import cuda
from saw_trtllm.backends.tensorrt.sample_rows import StagedRows, TokenLists
from saw_trtllm.errors import EngineError
from saw_trtllm.ops.arrays import kernels, raise_for
from saw_trtllm.ops.sample import LISTED, ROW
from saw_trtllm.runtime.sampling import SamplingState


class GpuSampler:
    """Draws the next tokens of up to ``max_sequences`` sequences from their logits, and keeps them for the next step.

    All parameters lie in device memory at addresses that stay, so that :meth:`launch` and :meth:`resolve` may be part
    of a CUDA graph. What it packs for a step is read by the GPU until the step is done: two sets are used in turn.

    Parameters
    ----------
    max_sequences, vocab_size : int

    Attributes
    ----------
    tokens_ptr, logprobs_ptr : int
        int32 and float64 ``[max_sequences]`` on the GPU: what the last launch chose, -1 where nothing was asked for,
        and the log-probabilities that were.

    Raises
    ------
    EngineError
        If the vocabulary is larger than the kernel's sums allow.
    """

    def __init__(self, max_sequences: int, vocab_size: int) -> None:
        self._module = kernels()
        if vocab_size > self._module.MAX_VOCAB:
            raise EngineError(
                f"the engine's vocabulary has {vocab_size} tokens: sampling on the GPU takes {self._module.MAX_VOCAB}"
            )
        self._vocab_size = vocab_size
        self._lists = TokenLists()
        self._results = cuda.DeviceBuffer(max_sequences * (8 + 4))
        self.logprobs_ptr = self._results.address
        self.tokens_ptr = self._results.address + 8 * max_sequences
        self._rows = cuda.DeviceBuffer(max_sequences * ROW.itemsize)
        self._sets = [_Set(max_sequences, vocab_size) for _ in range(2)]
        self._turn = 0

    @property
    def nbytes(self) -> int:
        """Bytes of the GPU's memory that it holds."""
        return self._results.nbytes + self._rows.nbytes + sum(s.lists.nbytes for s in self._sets)

    def prepare(self, sampling: Sequence[SamplingState | None]) -> None:
        """Pack a step's draws. Nothing is launched; the last step may be in flight, not the one before it."""
        self._turn = 1 - self._turn
        self._sets[self._turn].fill(sampling, self._lists.of(sampling))

    def upload(self, stream: int) -> None:
        """Copy what :meth:`prepare` packed to the GPU, in the stream's order."""
        self._sets[self._turn].upload(self._rows.address, stream)

    def launch(self, logits_ptr: int, rows_ptr: int, num_rows: int, stream: int) -> None:
        """Draw.

        Parameters
        ----------
        logits_ptr : int
            fp32 ``[*, vocab_size]`` on the GPU; the same bits before and after.
        rows_ptr : int
            int32 ``[num_rows]`` on the GPU: sequence i draws from row ``rows[i] - 1``. 0: from row i.
        num_rows : int
            Sequences; those beyond the packed ones draw nothing.
        stream : int

        Raises
        ------
        KernelError
            If the GPU rejects the launch.
        """
        code = self._module.sample(
            logits=logits_ptr,
            row_ends=rows_ptr,
            rows=self._rows.address,
            tokens=self.tokens_ptr,
            logprobs=self.logprobs_ptr,
            num_rows=num_rows,
            vocab_size=self._vocab_size,
            stream=stream,
        )
        raise_for(code, "sample", f"{num_rows} rows of {self._vocab_size} logits")

    def enqueue(self, logits_ptr: int, rows_ptr: int, num_rows: int, stream: int) -> None:
        """:meth:`upload` and :meth:`launch`."""
        self.upload(stream)
        self.launch(logits_ptr, rows_ptr, num_rows, stream)

    def resolve(self, input_ids_ptr: int, num_tokens: int, stream: int) -> None:
        """Put the tokens of the last launch where ``num_tokens`` int32 ids on the GPU say ``-1 - j``.

        Raises
        ------
        KernelError
            If the GPU rejects the launch.
        """
        code = self._module.resolve_tokens(
            input_ids=input_ids_ptr, num_tokens=num_tokens, tokens=self.tokens_ptr, stream=stream
        )
        raise_for(code, "resolve_tokens", f"{num_tokens} tokens")

    def close(self) -> None:
        """Free what it holds."""
        self._results.close()
        self._rows.close()
        for rows in self._sets:
            rows.close()


class _Set:
    """A step's rows and lists in pinned memory, and the lists' place on the GPU, which grows as they do."""

    def __init__(self, max_sequences: int, vocab_size: int) -> None:
        self._pinned_rows = cuda.PinnedBuffer(max_sequences * ROW.itemsize)
        self._staged = StagedRows(self._pinned_rows.array(ROW, (max_sequences,)), vocab_size)
        self._num_listed = 0
        self._make_lists(1024)

    def fill(self, sampling: Sequence[SamplingState | None], lists: dict[int, np.ndarray]) -> None:
        self._staged.fill(sampling)
        self._num_listed = sum(map(len, lists.values()))
        if self._num_listed > self._capacity:
            self._close_lists()
            self._make_lists(2 * self._num_listed)
        start = 0
        for i, listed in lists.items():
            self._listed[start : start + len(listed)] = listed
            row = self._staged.rows[i]
            row["listed"], row["num_listed"] = self.lists.address + start * LISTED.itemsize, len(listed)
            start += len(listed)

    def upload(self, rows_ptr: int, stream: int) -> None:
        _upload(rows_ptr, self._pinned_rows.address, self._pinned_rows.nbytes, stream)
        if self._num_listed:
            nbytes = self._num_listed * LISTED.itemsize
            _upload(self.lists.address, self._pinned_lists.address, nbytes, stream)

    def close(self) -> None:
        self._pinned_rows.close()
        self._close_lists()

    def _make_lists(self, capacity: int) -> None:
        self._capacity = capacity
        self.lists = cuda.DeviceBuffer(capacity * LISTED.itemsize)
        self._pinned_lists = cuda.PinnedBuffer(capacity * LISTED.itemsize)
        self._listed = self._pinned_lists.array(LISTED, (capacity,))

    def _close_lists(self) -> None:
        self.lists.close()
        self._pinned_lists.close()


def _upload(address: int, source: int, nbytes: int, stream: int) -> None:
    kind = cuda.runtime.cudaMemcpyKind.cudaMemcpyHostToDevice
    cuda.call(cuda.runtime.cudaMemcpyAsync, address, source, nbytes, kind, stream)
