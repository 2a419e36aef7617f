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
from saw_trtllm.runtime.sampling_params import MAX_TOP_LOGPROBS


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
    top_tokens_ptr, top_logprobs_ptr : int
        int32 and float64 ``[max_sequences, MAX_TOP_LOGPROBS]`` on the GPU: the likeliest tokens under the model.
    num_top : list of int
        How many of those each sequence of the last :meth:`prepare` wants; empty if none does.

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
        places = max_sequences * (1 + MAX_TOP_LOGPROBS)
        self._results = cuda.DeviceBuffer(places * (8 + 4))
        self.logprobs_ptr = self._results.address
        self.top_logprobs_ptr = self.logprobs_ptr + 8 * max_sequences
        self.tokens_ptr = self.logprobs_ptr + 8 * places
        self.top_tokens_ptr = self.tokens_ptr + 4 * max_sequences
        self.num_top: list[int] = []
        self._rows = cuda.DeviceBuffer(max_sequences * ROW.itemsize)
        self._sets = [_Set(max_sequences, vocab_size) for _ in range(2)]
        self._turn = 0

    @property
    def nbytes(self) -> int:
        """Bytes of the GPU's memory that it holds."""
        return self._results.nbytes + self._rows.nbytes + sum(s.nbytes for s in self._sets)

    def prepare(self, sampling: Sequence[SamplingState | None]) -> None:
        """Pack a step's draws. Nothing is launched; the last step may be in flight, not the one before it."""
        self._turn = 1 - self._turn
        self._sets[self._turn].fill(sampling, self._lists.of(sampling))
        self.num_top = self._sets[self._turn].num_top(len(sampling))

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
            top_tokens=self.top_tokens_ptr,
            top_logprobs=self.top_logprobs_ptr,
            max_top=MAX_TOP_LOGPROBS,
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
    """What a step's draws read, in pinned memory, and where the lists and masks of them go on the GPU."""

    def __init__(self, max_sequences: int, vocab_size: int) -> None:
        self._pinned_rows = cuda.PinnedBuffer(max_sequences * ROW.itemsize)
        self._staged = StagedRows(self._pinned_rows.array(ROW, (max_sequences,)), vocab_size)
        self._lists, self._masks = _StagedArrays(LISTED), _StagedArrays(np.dtype(np.uint32))

    @property
    def nbytes(self) -> int:
        return self._lists.nbytes + self._masks.nbytes

    def fill(self, sampling: Sequence[SamplingState | None], lists: dict[int, np.ndarray]) -> None:
        self._staged.fill(sampling)
        rows = self._staged.rows
        for i, address, count in self._lists.fill(lists):
            rows[i]["listed"], rows[i]["num_listed"] = address, count
        masks = {i: s.mask for i, s in enumerate(sampling) if s is not None and s.mask is not None}
        for i, address, _ in self._masks.fill(masks):
            rows[i]["mask"] = address

    def num_top(self, count: int) -> list[int]:
        wanted = self._staged.rows["num_logprobs"][:count] - 1
        return wanted.tolist() if wanted.max(initial=0) > 0 else []

    def upload(self, rows_ptr: int, stream: int) -> None:
        _upload(rows_ptr, self._pinned_rows.address, self._pinned_rows.nbytes, stream)
        self._lists.upload(stream)
        self._masks.upload(stream)

    def close(self) -> None:
        self._pinned_rows.close()
        self._lists.close()
        self._masks.close()


class _StagedArrays:
    """Arrays of a step, one after the other in pinned memory, and their place on the GPU, which grows as they do."""

    def __init__(self, dtype: np.dtype) -> None:
        self._dtype = dtype
        self._length = 0
        self._make(1024)

    @property
    def nbytes(self) -> int:
        return self._on_gpu.nbytes

    def fill(self, arrays: dict[int, np.ndarray]) -> list[tuple[int, int, int]]:
        """Take a step's arrays in, in the place of the last ones: each one's key, address on the GPU, and length."""
        self._length = sum(map(len, arrays.values()))
        if self._length > self._capacity:
            before = self._on_gpu, self._pinned
            self._make(2 * self._length)
            for buffer in before:
                buffer.close()
        start, places = 0, []
        for i, array in arrays.items():
            self._staged[start : start + len(array)] = array
            places.append((i, self._on_gpu.address + start * self._dtype.itemsize, len(array)))
            start += len(array)
        return places

    def upload(self, stream: int) -> None:
        if self._length:
            _upload(self._on_gpu.address, self._pinned.address, self._length * self._dtype.itemsize, stream)

    def close(self) -> None:
        self._on_gpu.close()
        self._pinned.close()

    def _make(self, capacity: int) -> None:
        on_gpu = cuda.DeviceBuffer(capacity * self._dtype.itemsize)
        try:
            pinned = cuda.PinnedBuffer(capacity * self._dtype.itemsize)
        except BaseException:
            on_gpu.close()
            raise
        # All at once: without the memory for more, what was there before goes on.
        self._capacity, self._on_gpu, self._pinned = capacity, on_gpu, pinned
        self._staged = pinned.array(self._dtype, (capacity,))


def _upload(address: int, source: int, nbytes: int, stream: int) -> None:
    kind = cuda.runtime.cudaMemcpyKind.cudaMemcpyHostToDevice
    cuda.call(cuda.runtime.cudaMemcpyAsync, address, source, nbytes, kind, stream)
