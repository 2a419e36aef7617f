// The row format and the paged pool, as docs/kernels.md and saw_trtllm/format.py describe them.
//
// row    head_dim/2 bytes of codes (byte b: dim 2b in the low nibble, dim 2b+1 in the high one), fp16 scale, fp16 lo;
//        of 8 bits: head_dim bytes of codes, and the same tail
// pool   uint8 [num_blocks, num_layers, 2 (K, V), num_kv_heads, tokens_per_block, row_bytes]; where K's rows are
//        longer, a layer of a block has all rows of K, and then those of V
#pragma once

#include <cstddef>
#include <cstdint>

#include <cuda_runtime.h>

namespace saw {

constexpr int kFormatVersion = 1;
// Smallest scale of a row before it is rounded: that of a constant row becomes fp16's smallest number, not 0.
constexpr float kMinScale = 0x1p-24f;
constexpr int kTailBytes = 4;  // scale and lo

enum class DType : int { kFloat16 = 0, kBFloat16 = 1 };

// What a row holds. kUnquantized is the activations' own 16-bit type: the baseline. Of kKey8Value4 a row of K has codes
// of 8 bits, and one of V of 4.
enum class CacheType : int { kInt4 = 0, kUnquantized = 1, kKey8Value4 = 2 };

enum KV : int { kKey = 0, kValue = 1 };

__host__ __device__ constexpr int int4_row_bytes(int head_dim) { return head_dim / 2 + kTailBytes; }
__host__ __device__ constexpr int int8_row_bytes(int head_dim) { return head_dim + kTailBytes; }

// Of K's codes.
__host__ __device__ constexpr int key_bits(CacheType cache) { return cache == CacheType::kKey8Value4 ? 8 : 4; }

// Of V's rows, and of K's unless they are longer.
__host__ __device__ constexpr int row_bytes(CacheType cache, int head_dim) {
    return cache == CacheType::kUnquantized ? head_dim * 2 : int4_row_bytes(head_dim);
}

__host__ __device__ constexpr int key_row_bytes(CacheType cache, int head_dim) {
    return cache == CacheType::kKey8Value4 ? int8_row_bytes(head_dim) : row_bytes(cache, head_dim);
}

// One layer of a pool, and the block table of a step, in TensorRT-LLM's terms: a table entry is
// block * num_layers * 2 + (0 K, 1 V), with bit 31 set for a block of the secondary pool.
struct PagedPool {
    uint8_t* base;                 // the pool's first byte
    int32_t const* block_offsets;  // [num_sequences, 2, max_blocks_per_seq]
    int max_blocks_per_seq;
    int layer;
    int num_kv_heads;
    int tokens_per_block;  // a power of two
    int row_bytes;         // of V

#ifdef __CUDACC__
    // Division by tokens_per_block, which integer division would spend twenty instructions on.
    __device__ int block_of(int token) const { return token >> (31 - __clz(tokens_per_block)); }

    __device__ int row_of(int token) const { return token & (tokens_per_block - 1); }
#endif

    __host__ __device__ size_t head_bytes() const { return size_t(tokens_per_block) * row_bytes; }

    __host__ __device__ size_t block_bytes() const { return head_bytes() * num_kv_heads; }

    __host__ __device__ int32_t const* table(int sequence, KV kv) const {
        return block_offsets + (size_t(sequence) * 2 + kv) * max_blocks_per_seq;
    }

    // First row of a head in the block that a table entry names.
    __host__ __device__ uint8_t* rows(int32_t offset, int kv_head) const {
        size_t const block = (size_t(layer) * 2 + (offset & 0x7fffffff)) * block_bytes();
        return base + block + kv_head * head_bytes();
    }

    // The same where K's rows and V's may be of two sizes. Which of them they are is an entry's last bit.
    template <int KeyRowBytes, int ValueRowBytes>
    __host__ __device__ uint8_t* rows(int32_t offset, int kv_head) const {
        if constexpr (KeyRowBytes == ValueRowBytes) {
            return rows(offset, kv_head);
        } else {
            size_t const index = size_t(layer) * 2 + (offset & 0x7fffffff), tokens = tokens_per_block;
            uint8_t* const pair = base + index / 2 * (num_kv_heads * tokens * (KeyRowBytes + ValueRowBytes));
            return index % 2 == kKey ? pair + kv_head * tokens * KeyRowBytes
                                     : pair + num_kv_heads * tokens * KeyRowBytes + kv_head * tokens * ValueRowBytes;
        }
    }
};

}  // namespace saw
