// The write of a step's keys and values to the pool, as a host function; common/library.h says what is true of all of
// them.
#pragma once

#include "saw/common/library.h"
#include "saw/common/pool.h"

namespace saw {

// RoPE, centring, rotation or frame, quantization and the paged write of a step's tokens, in one launch.
struct RotateQuantizeKvParams {
    // Q | K | V of each token before RoPE: [num_tokens, (num_heads + 2 * num_kv_heads) * head_dim] of dtype
    void const* qkv;
    float2 const* cos_sin;           // [num_positions, head_dim / 2] (cos, sin), NeoX half-split pairs
    int32_t const* position_ids;     // [num_tokens]: for RoPE
    int32_t const* last_token_ids;   // [num_sequences]: inclusive prefix sum of the tokens per sequence
    int32_t const* sequence_length;  // [num_sequences]: KV length with this step's tokens
    float const* k_center;           // [num_kv_heads, head_dim], subtracted from all keys after RoPE; or null
    // fp16 [num_kv_heads, 2, head_dim, head_dim] as frame.cuh lays it out: what K and Q of a KV head are multiplied by
    // in their rotation's place; or null, both of them. Not with kUnquantized.
    void const* k_frame;
    void const* q_frame;
    void* q_out;               // [num_tokens, num_heads, head_dim] of dtype: rotated Q
    void* k_out;               // [num_tokens, num_kv_heads, head_dim] of dtype: rotated K; or null
    void* v_out;               // [num_tokens, num_kv_heads, head_dim] of dtype: V (rotated if asked); or null
    int32_t* decode_counters;  // [num_sequences, num_kv_heads], zeroed for saw_decode_attention(); or null
    PagedPool pool;
    int num_tokens;
    int num_sequences;
    int num_heads;
    int head_dim;        // 64, 96, 128, 256
    int hadamard_order;  // 1: no rotation, the only one with kUnquantized; else a power of two from 16 that divides
                         // head_dim, with kKey8Value4 the largest
    bool rotate_v;       // here; false where the rotation is folded into the weights
    float range_factor;
    DType dtype;
    CacheType cache;
};
SAW_API cudaError_t saw_rotate_quantize_kv(RotateQuantizeKvParams const& params, cudaStream_t stream);

}  // namespace saw
