"""RoPE, centring, rotation, quantization and the paged write on the GPU, checked."""

from __future__ import annotations

from typing import Any

import numpy as np

from saw_trtllm.errors import OpError
from saw_trtllm.format import KVFormat
from saw_trtllm.ops.arrays import (
    ACTIVATION_DTYPES,
    DeviceArray,
    address,
    common_device,
    kernels,
    raise_for,
    stream_handle,
)
from saw_trtllm.ops.pool import Pool, cache_type, check_cache_dtype, check_order, describe

#: What the low part of a frame's number is multiplied by, so that it is no subnormal number of fp16.
_LOW_FACTOR = 2048


def pack_frame(frame: np.ndarray) -> np.ndarray:
    """A frame as the kernels' tensor cores take it.

    Each number x is split into two of float16: ``high = float16(x)`` and ``low = float16((x - high) · 2048)``, together
    22 bits. With a warp for 16 columns, and lane = 4 g + t, the last two axes are in truth ``[head_dim / 16 (warp),
    head_dim / 16 (step), 32 (lane), 8]``: number ``4 j + 2 h + i`` of a lane is row ``16 step + 8 h + 2 t + i``, column
    ``16 warp + 4 (g // 2) + 2 j + g % 2``.

    Parameters
    ----------
    frame : numpy.ndarray
        float32 ``[num_kv_heads, head_dim, head_dim]``: rows of keys or queries are multiplied by it from the right.

    Returns
    -------
    numpy.ndarray
        float16 ``[num_kv_heads, 2 (high, low), head_dim, head_dim]``.

    Raises
    ------
    OpError
        If a number of the frame is beyond float16, or not finite.
    """
    heads, dim, _ = frame.shape
    largest = np.abs(frame).max(initial=0)
    if not largest <= np.finfo(np.float16).max:
        raise OpError(
            f"a frame holds a number of magnitude {largest:.3g}: it must be finite and fit float16, so calibrate "
            "anew, or scale k_frame and q_frame against each other"
        )
    high = np.asarray(frame, np.float16)
    low = np.asarray((frame - high.astype(np.float32)) * _LOW_FACTOR, np.float16)
    split = np.stack([high, low], axis=1)
    # Rows are step, h, t, i; columns warp, g // 2, j, g % 2.
    split = split.reshape(heads, 2, dim // 16, 2, 4, 2, dim // 16, 4, 2, 2)
    return np.ascontiguousarray(split.transpose(0, 1, 6, 2, 7, 9, 4, 8, 3, 5)).reshape(heads, 2, dim, dim)


def rotate_quantize_kv(
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
    k_frame: Any = None,
    q_frame: Any = None,
    stream: Any = None,
) -> None:
    """RoPE, centring, rotation or frame, quantization and the paged write of a step's tokens, in one launch.

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
        uint8 ``[num_blocks, num_layers, 2, num_kv_heads, tokens_per_block, row_bytes]``, or what
        :meth:`KVFormat.pool_shape` gives for ``saw_k8v4``, written at ``layer``.
    block_offsets : array
        int32 ``[num_sequences, 2, max_blocks]``.
    kv_format : KVFormat
        head_dim, rotation, range factor; for ``fp16`` its dtype must be qkv's, for ``saw_k8v4`` its order the largest.
    layer : int
    q_out : array
        ``[num_tokens, num_heads, head_dim]`` of qkv's dtype, written: Q after RoPE and rotation, or its frame.
    k_out, v_out : array, optional
        ``[num_tokens, num_kv_heads, head_dim]`` of qkv's dtype, written: the step's own K and V, not quantized.
    k_center : array, optional
        float32 ``[num_kv_heads, head_dim]``, subtracted from all keys after RoPE.
    k_frame, q_frame : array, optional
        float16 ``[num_kv_heads, 2, head_dim, head_dim]`` of :func:`pack_frame`: what centred K, and Q of the head's
        group, are multiplied by in their rotation's place. Both or neither, and not with kv ``fp16``.
    stream : int or stream object, optional
        Default: the legacy default stream.

    Raises
    ------
    OpError
        If an argument does not fit; nothing is launched.
    KernelError
        If the GPU rejects the launch.
    """
    head_dim = kv_format.head_dim
    lengths = DeviceArray.of("sequence_length", sequence_length).check("int32", ["num_sequences"], 4)
    (num_sequences,) = lengths.shape
    where = Pool.check(pool, block_offsets, num_sequences, kv_format, layer)
    packed = DeviceArray.of("qkv", qkv)
    packed.check(ACTIVATION_DTYPES, ["num_tokens", "(num_heads + 2 * num_kv_heads) * head_dim"])
    check_cache_dtype(kv_format, packed)
    check_order(kv_format)
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
    frames = _check_frames(k_frame, q_frame, where.num_kv_heads, kv_format)
    device = common_device(
        [packed, angles, positions, ends, lengths, where.array, where.block_offsets, q, k, v, center, *frames]
    )
    module, handle = kernels(), stream_handle(stream)
    code = module.rotate_quantize_kv(
        qkv=packed.address,
        cos_sin=angles.address,
        position_ids=positions.address,
        last_token_ids=ends.address,
        sequence_length=lengths.address,
        k_center=address(center),
        k_frame=address(frames[0]),
        q_frame=address(frames[1]),
        q_out=q.address,
        k_out=address(k),
        v_out=address(v),
        pool=where.struct(),
        num_tokens=num_tokens,
        num_sequences=num_sequences,
        num_heads=num_heads,
        head_dim=head_dim,
        hadamard_order=kv_format.hadamard_order,
        rotate_v=kv_format.rotate_v,
        range_factor=kv_format.range_factor,
        dtype=getattr(module.DType, dtype),
        cache=cache_type(kv_format),
        device=device,
        stream=handle,
    )
    raise_for(code, "rotate_quantize_kv", describe(kv_format, where, dtype, num_heads, f"{num_tokens} tokens"))


def _check_frames(k_frame: Any, q_frame: Any, num_kv_heads: int, kv_format: KVFormat) -> list[DeviceArray | None]:
    given = {"k_frame": k_frame, "q_frame": q_frame}
    missing = [name for name, frame in given.items() if frame is None]
    if len(missing) == 2:
        return [None, None]
    if missing:
        raise OpError(f"{missing[0]} is None: k_frame and q_frame belong together, so give both or neither")
    if not kv_format.quantized:
        raise OpError("k_frame and q_frame are given with kv fp16, which has no frames: leave them out")
    shape = [num_kv_heads, 2, kv_format.head_dim, kv_format.head_dim]
    return [DeviceArray.of(name, frame).check("float16", shape) for name, frame in given.items()]
