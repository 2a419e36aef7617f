"""What the operations over a pool check and pass on alike."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from saw_trtllm.errors import OpError
from saw_trtllm.format import TOKENS_PER_BLOCK, KVFormat, default_hadamard_order
from saw_trtllm.ops.arrays import DeviceArray, kernels


@dataclass(frozen=True)
class Pool:
    """A checked pool, one layer of it and a block table."""

    array: DeviceArray
    block_offsets: DeviceArray
    layer: int
    num_kv_heads: int
    tokens_per_block: int
    row_bytes: int

    @classmethod
    def check(cls, pool: Any, block_offsets: Any, num_sequences: int, kv_format: KVFormat, layer: int) -> Pool:
        """Check a pool and its block table, of which ``layer`` is read or written."""
        array = DeviceArray.of("pool", pool)
        if kv_format.k_row_bytes == kv_format.row_bytes:
            array.check(
                "uint8", ["num_blocks", "num_layers", 2, "num_kv_heads", "tokens_per_block", kv_format.row_bytes]
            )
        else:
            array.check("uint8", ["num_blocks", "num_layers", "num_kv_heads", "tokens_per_block", kv_format.pair_bytes])
        num_layers = array.shape[1]
        num_kv_heads, tokens_per_block = array.shape[-3:-1]
        if tokens_per_block not in TOKENS_PER_BLOCK:
            valid = ", ".join(map(str, TOKENS_PER_BLOCK))
            raise OpError(f"pool has blocks of {tokens_per_block} tokens: it must be one of {valid}")
        if num_kv_heads < 1:
            raise OpError(f"pool has shape {list(array.shape)}: it needs at least one KV head")
        if not 0 <= layer < num_layers:
            raise OpError(f"layer is {layer}: pool has layers 0 to {num_layers - 1}")
        table = DeviceArray.of("block_offsets", block_offsets).check("int32", [num_sequences, 2, "max_blocks"], 4)
        return cls(array, table, layer, num_kv_heads, tokens_per_block, kv_format.row_bytes)

    def struct(self) -> Any:
        """The kernels' own struct."""
        return kernels().PagedPool(
            base=self.array.address,
            block_offsets=self.block_offsets.address,
            max_blocks_per_seq=self.block_offsets.shape[2],
            layer=self.layer,
            num_kv_heads=self.num_kv_heads,
            tokens_per_block=self.tokens_per_block,
            row_bytes=self.row_bytes,
        )


def check_cache_dtype(kv_format: KVFormat, activations: DeviceArray) -> None:
    """Reject 16-bit rows of another dtype than the activations'."""
    if not kv_format.quantized and kv_format.dtype != activations.dtype:
        raise OpError(
            f"{activations.name} has dtype {activations.dtype} and kv_format stores rows of {kv_format.dtype}: they "
            f"must be the same"
        )


def check_order(kv_format: KVFormat) -> None:
    """Reject a rotation that the write has no kernel of."""
    largest = default_hadamard_order(kv_format.head_dim)
    if kv_format.kv == "saw_k8v4" and kv_format.hadamard_order != largest:
        raise OpError(
            f"kv_format has hadamard_order {kv_format.hadamard_order}, and saw_k8v4 has kernels of the largest one "
            f"alone: it must be {largest}"
        )


def cache_type(kv_format: KVFormat) -> Any:
    """The kernels' name for the rows of a format."""
    types = kernels().CacheType
    if kv_format.kv == "saw_k8v4":
        return types.key8_value4
    return types.int4 if kv_format.quantized else types.unquantized


def describe(kv_format: KVFormat, pool: Pool, dtype: str, num_heads: int, work: str) -> str:
    """What a launch over a pool works on, for :func:`saw_trtllm.ops.arrays.raise_for`."""
    return (
        f"{work} of {dtype}, {num_heads} heads, {pool.num_kv_heads} KV heads, head_dim {kv_format.head_dim}, kv "
        f"{kv_format.kv}, hadamard_order {kv_format.hadamard_order}, {pool.tokens_per_block} tokens per block"
    )
