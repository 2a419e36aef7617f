// Attention to a paged pool, as host functions; common/library.h says what is true of all of them.
#pragma once

#include "saw/common/library.h"
#include "saw/common/pool.h"

namespace saw {

// What decode and prefill share. A query is a token and a query head.
struct AttentionParams {
    void const* q;                   // [queries, num_heads, head_dim] of dtype: rotated as the keys are
    void* out;                       // as q
    int32_t const* sequence_length;  // [num_sequences]: KV length with this step's tokens
    float const* sinks;              // [num_heads]: a learned logit that takes its share of the softmax; or null
    PagedPool pool;
    DType dtype;
    int num_sequences;
    int num_heads;
    int head_dim;         // 64, 96, 128, 256
    int window;           // keys that a query sees, its own among them; 0 is all
    float softmax_scale;  // factor on q.k
    float softcap;        // scores become softcap * tanh(score / softcap); 0 is none
    CacheType cache;
};

// Attention of one query token per sequence to all of its tokens in the pool, the current one among them. A sequence of
// length 0 gives zeros.
struct DecodeParams : AttentionParams {  // queries: num_sequences
    // saw_decode_workspace_bytes(), zeroed once before its first use, not shared by concurrent launches
    void* workspace;
    // [num_sequences, num_kv_heads] zeros, and zeros after a launch; or null: they lie in the workspace. With them,
    // the workspace needs no zeroing, and saw_decode_workspace_bytes() of 0 sequences is its size.
    int32_t* counters;
};
// Independent of the context: splits are bounded by the number of CTAs that the GPU holds.
SAW_API size_t saw_decode_workspace_bytes(int max_sequences, int num_heads, int num_kv_heads, int head_dim);
SAW_API cudaError_t saw_decode_attention(DecodeParams const& params, cudaStream_t stream);

// Attention of a step's chunks: each query to its sequence's history in the pool, and causally to the chunk itself,
// whose K and V are taken as they are, not as the pool holds them. A sequence without tokens in the step writes
// nothing.
struct PrefillParams : AttentionParams {  // queries: num_tokens
    void const*
        k;  // [num_tokens, num_kv_heads, head_dim] of dtype: the chunk's own, as saw_rotate_quantize_kv() leaves it
    void const* v;                  // as k
    int32_t const* last_token_ids;  // [num_sequences]: inclusive prefix sum of the tokens per sequence
    int num_tokens;
};
SAW_API cudaError_t saw_prefill_attention(PrefillParams const& params, cudaStream_t stream);

}  // namespace saw
