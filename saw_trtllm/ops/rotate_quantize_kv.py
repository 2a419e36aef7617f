"""RoPE, centring, rotation, quantization and the paged write on the GPU, checked."""

from __future__ import annotations

from typing import Any

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
from saw_trtllm.ops.pool import Pool, cache_type, check_cache_dtype, describe


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
    where = Pool.check(pool, block_offsets, num_sequences, kv_format, layer)
    packed = DeviceArray.of("qkv", qkv)
    packed.check(ACTIVATION_DTYPES, ["num_tokens", "(num_heads + 2 * num_kv_heads) * head_dim"])
    check_cache_dtype(kv_format, packed)
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
    code = module.rotate_quantize_kv(
        qkv=packed.address,
        cos_sin=angles.address,
        position_ids=positions.address,
        last_token_ids=ends.address,
        sequence_length=lengths.address,
        k_center=address(center),
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
