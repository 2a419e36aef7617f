"""Attention to a paged cache on the GPU, checked: decodes and prefills."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from saw_trtllm.errors import KernelError, OpError
from saw_trtllm.format import HEAD_DIMS, KVFormat
from saw_trtllm.ops.arrays import (
    ACTIVATION_DTYPES,
    DeviceArray,
    address,
    common_device,
    kernels,
    raise_for,
    stream_handle,
)
from saw_trtllm.ops.pool import Pool, cache_type, check_cache_dtype, describe

#: Query heads that may share a KV head in attention.
MAX_GROUP = 16


def decode_workspace_bytes(max_sequences: int, num_heads: int, num_kv_heads: int, head_dim: int) -> int:
    """Bytes that :func:`decode_attention` needs as workspace on the current GPU, whatever the context.

    Raises
    ------
    OpError
        If the heads are none that it takes.
    """
    if head_dim not in HEAD_DIMS:
        raise OpError(f"head_dim is {head_dim}: it must be one of {', '.join(map(str, HEAD_DIMS))}")
    _check_group(num_heads, num_kv_heads)
    if max_sequences < 1:
        raise OpError(f"max_sequences is {max_sequences}: it must be at least 1")
    size = kernels().decode_workspace_bytes(max_sequences, num_heads, num_kv_heads, head_dim)
    if size == 0:
        raise KernelError(f"no GPU at hand can run decode_attention with head_dim {head_dim}: check nvidia-smi")
    return size


def decode_attention(
    q: Any,
    sequence_length: Any,
    pool: Any,
    block_offsets: Any,
    *,
    kv_format: KVFormat,
    layer: int,
    out: Any,
    workspace: Any,
    softmax_scale: float | None = None,
    window: int | None = None,
    softcap: float | None = None,
    sinks: Any = None,
    stream: Any = None,
) -> None:
    """Attention of one query token per sequence to all of its tokens in the pool, the current one among them.

    Parameters
    ----------
    q : array
        float16 or bfloat16 ``[num_sequences, num_heads, head_dim]``, rotated as :func:`rotate_quantize_kv` leaves it.
    sequence_length : array
        int32 ``[num_sequences]``: KV length with the current token; a sequence of length 0 gives zeros.
    pool, block_offsets, kv_format, layer
        As in :func:`rotate_quantize_kv`.
    out : array
        ``[num_sequences, num_heads, head_dim]`` of q's dtype, written; in V's rotated basis where V is rotated.
    workspace : array
        uint8 ``[n]``, n at least :func:`decode_workspace_bytes`. Zeroed once before its first use; launches that may
        run at the same time must not share it.
    softmax_scale : float, optional
        Factor on q·k; 1/sqrt(head_dim) by default.
    window : int, optional
        Keys that a query sees, its own among them; all by default.
    softcap : float, optional
        Scores become ``softcap · tanh(score / softcap)``.
    sinks : array, optional
        float32 ``[num_heads]``: a logit per head that takes its share of the softmax and has no value.
    stream : int or stream object, optional
        Default: the legacy default stream.

    Raises
    ------
    OpError
        If an argument does not fit; nothing is launched.
    KernelError
        If the GPU rejects the launch.
    """
    step = _Attention.check(
        "num_sequences",
        q,
        sequence_length,
        pool,
        block_offsets,
        out,
        sinks,
        kv_format,
        layer,
        softmax_scale,
        window,
        softcap,
    )
    scratch = DeviceArray.of("workspace", workspace).check("uint8", ["n"])
    num_sequences, num_heads, head_dim = step.queries.shape
    if num_sequences:
        needed = decode_workspace_bytes(num_sequences, num_heads, step.pool.num_kv_heads, head_dim)
        if scratch.shape[0] < needed:
            raise OpError(
                f"workspace has {scratch.shape[0]} bytes: {num_sequences} sequences need the {needed} of "
                f"decode_workspace_bytes"
            )
    step.launch("decode_attention", {"workspace": scratch}, {}, stream, f"{num_sequences} sequences")


def prefill_attention(
    q: Any,
    k: Any,
    v: Any,
    last_token_ids: Any,
    sequence_length: Any,
    pool: Any,
    block_offsets: Any,
    *,
    kv_format: KVFormat,
    layer: int,
    out: Any,
    softmax_scale: float | None = None,
    window: int | None = None,
    softcap: float | None = None,
    sinks: Any = None,
    stream: Any = None,
) -> None:
    """Attention of a step's chunks: each query to its sequence's history in the pool, and causally to the chunk itself.

    The chunk's own keys and values are taken from ``k`` and ``v``, not from the pool. The step's prefills come first:
    give the arrays up to the last of their tokens and sequences, and the rest to :func:`decode_attention`.

    Parameters
    ----------
    q : array
        float16 or bfloat16 ``[num_tokens, num_heads, head_dim]``, rotated as :func:`rotate_quantize_kv` leaves it.
    k, v : array
        ``[num_tokens, num_kv_heads, head_dim]`` of q's dtype: ``k_out`` and ``v_out`` of :func:`rotate_quantize_kv`.
    last_token_ids : array
        int32 ``[num_sequences]``: inclusive prefix sum of the tokens of each sequence.
    sequence_length : array
        int32 ``[num_sequences]``: KV length with this step's tokens.
    pool, block_offsets, kv_format, layer
        As in :func:`rotate_quantize_kv`.
    out : array
        ``[num_tokens, num_heads, head_dim]`` of q's dtype, written up to the last of ``last_token_ids``; in V's rotated
        basis where V is rotated.
    softmax_scale, window, softcap, sinks, stream
        As in :func:`decode_attention`.

    Raises
    ------
    OpError
        If an argument does not fit; nothing is launched.
    KernelError
        If the GPU rejects the launch.
    """
    step = _Attention.check(
        "num_tokens",
        q,
        sequence_length,
        pool,
        block_offsets,
        out,
        sinks,
        kv_format,
        layer,
        softmax_scale,
        window,
        softcap,
    )
    num_tokens, _, head_dim = step.queries.shape
    arrays = {
        name: DeviceArray.of(name, array).check(step.queries.dtype, [num_tokens, step.pool.num_kv_heads, head_dim])
        for name, array in (("k", k), ("v", v))
    }
    ends = DeviceArray.of("last_token_ids", last_token_ids).check("int32", [step.lengths.shape[0]], 4)
    arrays["last_token_ids"] = ends
    step.launch("prefill_attention", arrays, {"num_tokens": num_tokens}, stream, f"{num_tokens} tokens")


@dataclass(frozen=True)
class _Attention:
    """The checked arguments that decode and prefill share."""

    queries: DeviceArray
    lengths: DeviceArray
    pool: Pool
    out: DeviceArray
    sinks: DeviceArray | None
    kv_format: KVFormat
    options: dict[str, Any]

    @classmethod
    def check(
        cls,
        rows: str,
        q: Any,
        sequence_length: Any,
        pool: Any,
        block_offsets: Any,
        out: Any,
        sinks: Any,
        kv_format: KVFormat,
        layer: int,
        softmax_scale: float | None,
        window: int | None,
        softcap: float | None,
    ) -> _Attention:
        """``rows`` says what q has rows of: ``num_sequences``, one each, or ``num_tokens``."""
        queries = DeviceArray.of("q", q).check(ACTIVATION_DTYPES, [rows, "num_heads", kv_format.head_dim])
        check_cache_dtype(kv_format, queries)
        num_heads = queries.shape[1]
        sequences = queries.shape[0] if rows == "num_sequences" else "num_sequences"
        lengths = DeviceArray.of("sequence_length", sequence_length).check("int32", [sequences], 4)
        where = Pool.check(pool, block_offsets, lengths.shape[0], kv_format, layer)
        _check_group(num_heads, where.num_kv_heads)
        result = DeviceArray.of("out", out).check(queries.dtype, list(queries.shape))
        logits = None if sinks is None else DeviceArray.of("sinks", sinks).check("float32", [num_heads], 4)
        options = _score_options(kv_format.head_dim, softmax_scale, window, softcap)
        return cls(queries, lengths, where, result, logits, kv_format, options)

    def launch(
        self, kernel: str, arrays: dict[str, DeviceArray], counts: dict[str, int], stream: Any, work: str
    ) -> None:
        """Launch with what only this kernel takes."""
        pool, dtype, (_, num_heads, head_dim) = self.pool, self.queries.dtype, self.queries.shape
        shared = [self.queries, self.lengths, pool.array, pool.block_offsets, self.out, self.sinks]
        device = common_device([*shared, *arrays.values()])
        module, handle = kernels(), stream_handle(stream)
        code = getattr(module, kernel)(
            q=self.queries.address,
            out=self.out.address,
            sequence_length=self.lengths.address,
            sinks=address(self.sinks),
            pool=pool.struct(),
            **{name: array.address for name, array in arrays.items()},
            **counts,
            num_sequences=self.lengths.shape[0],
            num_heads=num_heads,
            head_dim=head_dim,
            **self.options,
            dtype=getattr(module.DType, dtype),
            cache=cache_type(self.kv_format),
            device=device,
            stream=handle,
        )
        raise_for(code, kernel, describe(self.kv_format, pool, dtype, num_heads, work))


def _score_options(
    head_dim: int, softmax_scale: float | None, window: int | None, softcap: float | None
) -> dict[str, Any]:
    scale = 1 / math.sqrt(head_dim) if softmax_scale is None else softmax_scale
    for name, value in (("softmax_scale", scale), ("softcap", 1.0 if softcap is None else softcap)):
        if not (math.isfinite(value) and value > 0):
            raise OpError(f"{name} is {value}: it must be finite and above 0")
    if window is not None and window < 1:
        raise OpError(f"window is {window}: it must be at least 1, or None for all keys")
    return {"window": window or 0, "softmax_scale": scale, "softcap": softcap or 0.0}


def _check_group(num_heads: int, num_kv_heads: int) -> None:
    if num_kv_heads < 1 or num_heads < 1 or num_heads % num_kv_heads or num_heads // num_kv_heads > MAX_GROUP:
        raise OpError(
            f"num_heads is {num_heads} and num_kv_heads {num_kv_heads}: num_heads must be num_kv_heads times 1 to "
            f"{MAX_GROUP}"
        )
