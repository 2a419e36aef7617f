"""The CUDA kernels on arrays of any framework.

Every argument is checked before a launch: dtype, shape, layout, alignment and device. What lies behind an address, such
as a block table's entries, is not: the kernels read it on the GPU.

The pool is ``uint8 [num_blocks, num_layers, 2 (K, V), num_kv_heads, tokens_per_block, row_bytes]``, and the block table
TensorRT-LLM's: ``int32 [num_sequences, 2 (K, V), max_blocks]`` of ``block · num_layers · 2 + (0 K, 1 V)``, bit 31
ignored, entries beyond a sequence's blocks never used. :mod:`saw_trtllm.format` says what a row is.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from saw_trtllm.device_array import DeviceArray, common_device, kernels, stream_handle
from saw_trtllm.errors import KernelError, OpError
from saw_trtllm.format import HEAD_DIMS, TOKENS_PER_BLOCK, KVFormat

ACTIVATION_DTYPES = ("float16", "bfloat16")
#: Query heads that may share a KV head in attention.
MAX_GROUP = 16


@dataclass(frozen=True)
class _Pool:
    """A checked pool, one layer of it and a block table."""

    array: DeviceArray
    block_offsets: DeviceArray
    layer: int
    num_kv_heads: int
    tokens_per_block: int
    row_bytes: int

    @classmethod
    def check(cls, pool: Any, block_offsets: Any, num_sequences: int, kv_format: KVFormat, layer: int) -> _Pool:
        array = DeviceArray.of("pool", pool)
        array.check(
            "uint8",
            ["num_blocks", "num_layers", 2, "num_kv_heads", "tokens_per_block", kv_format.row_bytes],
        )
        _, num_layers, _, num_kv_heads, tokens_per_block, row_bytes = array.shape
        if tokens_per_block not in TOKENS_PER_BLOCK:
            valid = ", ".join(map(str, TOKENS_PER_BLOCK))
            raise OpError(f"pool has blocks of {tokens_per_block} tokens: it must be one of {valid}")
        if num_kv_heads < 1:
            raise OpError(f"pool has shape {list(array.shape)}: it needs at least one KV head")
        if not 0 <= layer < num_layers:
            raise OpError(f"layer is {layer}: pool has layers 0 to {num_layers - 1}")
        table = DeviceArray.of("block_offsets", block_offsets).check("int32", [num_sequences, 2, "max_blocks"], 4)
        return cls(array, table, layer, num_kv_heads, tokens_per_block, row_bytes)

    def struct(self) -> Any:
        return kernels().PagedPool(
            base=self.array.address,
            block_offsets=self.block_offsets.address,
            max_blocks_per_seq=self.block_offsets.shape[2],
            layer=self.layer,
            num_kv_heads=self.num_kv_heads,
            tokens_per_block=self.tokens_per_block,
            row_bytes=self.row_bytes,
        )


def kv_write(
    qkv: Any,
    cos_sin: Any,
    position_ids: Any,
    last_token_ids: Any,
    sequence_length: Any,
    pool: Any,
    block_offsets: Any,
    *,
    kv_format: KVFormat,
    layer: int,
    q_out: Any,
    k_out: Any = None,
    v_out: Any = None,
    k_center: Any = None,
    stream: Any = None,
) -> None:
    """RoPE, centring, rotation, quantization and the paged write of a step's tokens, in one launch.

    A token's slot is ``sequence_length[s] - (last_token_ids[s] - token)`` of its sequence s. Tokens from the last of
    ``last_token_ids`` on belong to no sequence: they are rotated, and not written to the pool.

    Parameters
    ----------
    qkv : array
        float16 or bfloat16 ``[num_tokens, (num_heads + 2 · num_kv_heads) · head_dim]``: Q, K and V before RoPE.
    cos_sin : array
        float32 ``[num_positions, head_dim / 2, 2]``: cosine and sine of the half-split pairs.
    position_ids : array
        int32 ``[num_tokens]``, each below num_positions.
    last_token_ids : array
        int32 ``[num_sequences]``: inclusive prefix sum of the tokens of each sequence.
    sequence_length : array
        int32 ``[num_sequences]``: KV length with this step's tokens.
    pool : array
        uint8 ``[num_blocks, num_layers, 2, num_kv_heads, tokens_per_block, row_bytes]``, written at ``layer``.
    block_offsets : array
        int32 ``[num_sequences, 2, max_blocks]``.
    kv_format : KVFormat
        head_dim, rotation, range factor; for ``fp16`` its dtype must be qkv's.
    layer : int
    q_out : array
        ``[num_tokens, num_heads, head_dim]`` of qkv's dtype, written: Q after RoPE and rotation.
    k_out, v_out : array, optional
        ``[num_tokens, num_kv_heads, head_dim]`` of qkv's dtype, written: the step's own K and V, not quantized.
    k_center : array, optional
        float32 ``[num_kv_heads, head_dim]``, subtracted from all keys after RoPE.
    stream : int or stream object, optional
        Default: the legacy default stream.

    Raises
    ------
    OpError
        If an argument does not fit; nothing is launched.
    KernelError
        If the GPU refuses the launch.
    """
    head_dim = kv_format.head_dim
    lengths = DeviceArray.of("sequence_length", sequence_length).check("int32", ["num_sequences"], 4)
    (num_sequences,) = lengths.shape
    where = _Pool.check(pool, block_offsets, num_sequences, kv_format, layer)
    packed = DeviceArray.of("qkv", qkv)
    packed.check(ACTIVATION_DTYPES, ["num_tokens", "(num_heads + 2 * num_kv_heads) * head_dim"])
    _check_cache_dtype(kv_format, packed)
    num_tokens, width = packed.shape
    num_heads = width // head_dim - 2 * where.num_kv_heads
    if width % head_dim or num_heads < 1 or num_heads % where.num_kv_heads:
        raise OpError(
            f"qkv has {width} channels: it must be (num_heads + 2 * {where.num_kv_heads}) * {head_dim}, num_heads "
            f"being a multiple of the pool's {where.num_kv_heads} KV heads"
        )
    if num_tokens and not num_sequences:
        raise OpError(f"sequence_length has no sequence and qkv has {num_tokens} tokens: each token belongs to one")
    dtype = packed.dtype

    def kv_tensor(name: str, array: Any) -> DeviceArray | None:
        shape = [num_tokens, where.num_kv_heads, head_dim]
        return None if array is None else DeviceArray.of(name, array).check(dtype, shape)

    angles = DeviceArray.of("cos_sin", cos_sin).check("float32", ["num_positions", head_dim // 2, 2])
    positions = DeviceArray.of("position_ids", position_ids).check("int32", [num_tokens], 4)
    ends = DeviceArray.of("last_token_ids", last_token_ids).check("int32", [num_sequences], 4)
    q = DeviceArray.of("q_out", q_out).check(dtype, [num_tokens, num_heads, head_dim])
    k, v = kv_tensor("k_out", k_out), kv_tensor("v_out", v_out)
    center = None
    if k_center is not None:
        center = DeviceArray.of("k_center", k_center).check("float32", [where.num_kv_heads, head_dim])
    device = common_device(
        [packed, angles, positions, ends, lengths, where.array, where.block_offsets, q, k, v, center]
    )
    module, handle = kernels(), stream_handle(stream)
    code = module.kv_write(
        qkv=packed.address,
        cos_sin=angles.address,
        position_ids=positions.address,
        last_token_ids=ends.address,
        sequence_length=lengths.address,
        k_center=_address(center),
        q_out=q.address,
        k_out=_address(k),
        v_out=_address(v),
        pool=where.struct(),
        num_tokens=num_tokens,
        num_sequences=num_sequences,
        num_heads=num_heads,
        head_dim=head_dim,
        hadamard_order=kv_format.hadamard_order,
        rotate_v=kv_format.rotate_v,
        range_factor=kv_format.range_factor,
        dtype=getattr(module.DType, dtype),
        cache=_cache_type(kv_format),
        device=device,
        stream=handle,
    )
    _raise_for(code, "kv_write", kv_format, where, dtype, num_heads, f"{num_tokens} tokens")


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
        float16 or bfloat16 ``[num_sequences, num_heads, head_dim]``, rotated as :func:`kv_write` leaves it.
    sequence_length : array
        int32 ``[num_sequences]``: KV length with the current token; a sequence of length 0 gives zeros.
    pool, block_offsets, kv_format, layer
        As in :func:`kv_write`.
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
        If the GPU refuses the launch.
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
        float16 or bfloat16 ``[num_tokens, num_heads, head_dim]``, rotated as :func:`kv_write` leaves it.
    k, v : array
        ``[num_tokens, num_kv_heads, head_dim]`` of q's dtype: ``k_out`` and ``v_out`` of :func:`kv_write`.
    last_token_ids : array
        int32 ``[num_sequences]``: inclusive prefix sum of the tokens of each sequence.
    sequence_length : array
        int32 ``[num_sequences]``: KV length with this step's tokens.
    pool, block_offsets, kv_format, layer
        As in :func:`kv_write`.
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
        If the GPU refuses the launch.
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
    pool: _Pool
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
        _check_cache_dtype(kv_format, queries)
        num_heads = queries.shape[1]
        sequences = queries.shape[0] if rows == "num_sequences" else "num_sequences"
        lengths = DeviceArray.of("sequence_length", sequence_length).check("int32", [sequences], 4)
        where = _Pool.check(pool, block_offsets, lengths.shape[0], kv_format, layer)
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
            sinks=_address(self.sinks),
            pool=pool.struct(),
            **{name: array.address for name, array in arrays.items()},
            **counts,
            num_sequences=self.lengths.shape[0],
            num_heads=num_heads,
            head_dim=head_dim,
            **self.options,
            dtype=getattr(module.DType, dtype),
            cache=_cache_type(self.kv_format),
            device=device,
            stream=handle,
        )
        _raise_for(code, kernel, self.kv_format, pool, dtype, num_heads, work)


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


def _check_cache_dtype(kv_format: KVFormat, activations: DeviceArray) -> None:
    if not kv_format.quantized and kv_format.dtype != activations.dtype:
        raise OpError(
            f"{activations.name} has dtype {activations.dtype} and kv_format stores rows of {kv_format.dtype}: they "
            f"must be the same"
        )


def _check_group(num_heads: int, num_kv_heads: int) -> None:
    if num_kv_heads < 1 or num_heads < 1 or num_heads % num_kv_heads or num_heads // num_kv_heads > MAX_GROUP:
        raise OpError(
            f"num_heads is {num_heads} and num_kv_heads {num_kv_heads}: num_heads must be num_kv_heads times 1 to "
            f"{MAX_GROUP}"
        )


def _address(array: DeviceArray | None) -> int:
    return 0 if array is None else array.address


def _cache_type(kv_format: KVFormat) -> Any:
    return kernels().CacheType.int4 if kv_format.quantized else kernels().CacheType.raw


def _raise_for(code: int, kernel: str, kv_format: KVFormat, pool: _Pool, dtype: str, num_heads: int, work: str) -> None:
    if code:
        raise KernelError(
            f"{kernel} could not be launched ({kernels().error_string(code)}) for {work} of {dtype}, {num_heads} "
            f"heads, {pool.num_kv_heads} KV heads, head_dim {kv_format.head_dim}, kv {kv_format.kv}, hadamard_order "
            f"{kv_format.hadamard_order}, {pool.tokens_per_block} tokens per block: check that the kernels were built "
            f"for this GPU"
        )
