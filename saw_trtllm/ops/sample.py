"""The choice of next tokens on the GPU, checked; what it reads of each sequence is ``saw/sample/params.h``'s."""

from __future__ import annotations

from typing import Any

import numpy as np

from saw_trtllm.errors import OpError
from saw_trtllm.ops.arrays import DeviceArray, address, common_device, kernels, raise_for, stream_handle

#: How to choose one sequence's next token: ``saw::SampleRow``.
ROW = np.dtype(
    [
        ("seed", np.uint64),
        ("index", np.uint64),
        ("temperature", np.float64),
        ("top_p", np.float64),
        ("min_p", np.float64),
        ("repetition_penalty", np.float64),
        ("presence_penalty", np.float64),
        ("frequency_penalty", np.float64),
        ("listed", np.uint64),
        ("mask", np.uint64),
        ("num_listed", np.int32),
        ("top_k", np.int32),
        ("draw", np.int32),
        ("num_logprobs", np.int32),
    ]
)
#: A token whose logit changes before the choice: ``saw::ListedToken``. ``logit`` is the kernel's own.
LISTED = np.dtype([("token", np.int32), ("count", np.int32), ("bias", np.float32), ("logit", np.float32)])
BANNED, UNSEEN = -1, -2
NOTHING, GREEDY, BY_TOKEN, BY_LIKELIHOOD = range(4)


def sample(
    logits: Any,
    rows: Any,
    *,
    tokens: Any,
    logprobs: Any,
    top_tokens: Any = None,
    top_logprobs: Any = None,
    row_ends: Any = None,
    stream: Any = None,
) -> None:
    """Choose the next token of each sequence, as :mod:`saw_trtllm.runtime.sampling` does.

    Parameters
    ----------
    logits : array
        float32 ``[n, vocab_size]``; changed for the listed tokens while the kernel runs, and put back.
    rows : array
        uint8 ``[num_rows * ROW.itemsize]``: :data:`ROW` of each sequence.
    tokens : array
        int32 ``[num_rows]``, written; -1 where nothing was asked for.
    logprobs : array
        float64 ``[num_rows]``, written for those that want it: of the chosen token, before penalties and cuts.
    top_tokens, top_logprobs : array, optional
        int32 and float64 ``[num_rows, max_top]``, written for those that want it, so many as they want: the likeliest
        tokens under the model, the first of equals first, and their log-probabilities.
    row_ends : array, optional
        int32 ``[num_rows]``: sequence i draws from row ``row_ends[i] - 1``. By default from row i.
    stream : int or stream object, optional
        Default: the legacy default stream.

    Raises
    ------
    OpError
        If an argument does not fit; nothing is launched.
    KernelError
        If the GPU rejects the launch.
    """
    chosen = DeviceArray.of("tokens", tokens).check("int32", ["num_rows"], 4)
    (num_rows,) = chosen.shape
    source = DeviceArray.of("logits", logits).check("float32", ["n", "vocab_size"], 4)
    num_logits, vocab_size = source.shape
    how = DeviceArray.of("rows", rows).check("uint8", [num_rows * ROW.itemsize], 8)
    likely = DeviceArray.of("logprobs", logprobs).check("float64", [num_rows], 8)
    top, top_likely = _likeliest(top_tokens, top_logprobs, num_rows)
    ends = None if row_ends is None else DeviceArray.of("row_ends", row_ends).check("int32", [num_rows], 4)
    module, handle = kernels(), stream_handle(stream)
    if vocab_size > module.MAX_VOCAB:
        raise OpError(f"logits has a vocabulary of {vocab_size}: it must be at most {module.MAX_VOCAB}")
    if ends is None and num_logits < num_rows:
        raise OpError(f"logits has {num_logits} rows and tokens has {num_rows}: give a row each, or row_ends")
    common_device([chosen, source, how, likely, top, top_likely, ends])
    code = module.sample(
        logits=source.address,
        row_ends=address(ends),
        rows=how.address,
        tokens=chosen.address,
        logprobs=likely.address,
        top_tokens=address(top),
        top_logprobs=address(top_likely),
        max_top=0 if top is None else top.shape[1],
        num_rows=num_rows,
        vocab_size=vocab_size,
        stream=handle,
    )
    raise_for(code, "sample", f"{num_rows} rows of {vocab_size} logits")


def _likeliest(tokens: Any, logprobs: Any, num_rows: int) -> tuple[DeviceArray | None, DeviceArray | None]:
    if (tokens is None) != (logprobs is None):
        raise OpError("top_tokens and top_logprobs go together: give both or neither")
    if tokens is None:
        return None, None
    chosen = DeviceArray.of("top_tokens", tokens).check("int32", [num_rows, "max_top"], 4)
    return chosen, DeviceArray.of("top_logprobs", logprobs).check("float64", list(chosen.shape), 8)
