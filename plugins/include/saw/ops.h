// The operations of this library as host functions: check nothing but what the kernels rely on, launch, return.
// They allocate nothing, synchronize nothing and can be captured in a CUDA graph; lengths are read on the GPU.
#pragma once

#include "saw/layout.h"

namespace saw {

// RoPE, centring, rotation, quantization and the paged write of a step's tokens, in one launch.
struct KvWriteParams {
    // Q | K | V of each token before RoPE: [num_tokens, (num_heads + 2 * num_kv_heads) * head_dim] of dtype
    void const* qkv;
    float2 const* cos_sin;           // [num_positions, head_dim / 2] (cos, sin), NeoX half-split pairs
    int32_t const* position_ids;     // [num_tokens]: for RoPE
    int32_t const* last_token_ids;   // [num_sequences]: inclusive prefix sum of the tokens per sequence
    int32_t const* sequence_length;  // [num_sequences]: KV length with this step's tokens
    float const* k_center;           // [num_kv_heads, head_dim], subtracted from all keys after RoPE; or null
    void* q_out;                     // [num_tokens, num_heads, head_dim] of dtype: rotated Q
    void* k_out;                     // [num_tokens, num_kv_heads, head_dim] of dtype: rotated K; or null
    void* v_out;                     // [num_tokens, num_kv_heads, head_dim] of dtype: V (rotated if asked); or null
    int32_t* decode_counters;        // [num_sequences, num_kv_heads], zeroed for decode_attention; or null
    PagedPool pool;
    int num_tokens;
    int num_sequences;
    int num_heads;
    int head_dim;        // 64, 96, 128, 256
    int hadamard_order;  // 1: no rotation, the only one with kRaw; else a power of two from 16 that divides head_dim
    bool rotate_v;       // here; false where the rotation is folded into the weights
    float range_factor;
    DType dtype;
    CacheType cache;
};
cudaError_t kv_write(KvWriteParams const& params, cudaStream_t stream);

// Attention of one query token per sequence to all of its tokens in the pool, the current one among them.
struct DecodeParams {
    void const* q;                   // [num_sequences, num_heads, head_dim] of dtype: rotated as the keys are
    void* out;                       // [num_sequences, num_heads, head_dim] of dtype
    int32_t const* sequence_length;  // [num_sequences]; a sequence of length 0 gives zeros
    float const* sinks;              // [num_heads]: a learned logit that takes its share of the softmax; or null
    PagedPool pool;
    void* workspace;  // decode_workspace_bytes(), zeroed once before its first use, not shared by concurrent launches
    // [num_sequences, num_kv_heads] zeros, and zeros behind a launch; or null: they lie in the workspace. With them,
    // the workspace needs no zeroing, and decode_workspace_bytes() of 0 sequences is its size.
    int32_t* counters;
    int num_sequences;
    int num_heads;
    int head_dim;         // 64, 96, 128, 256
    int window;           // keys that a query sees, its own among them; 0 is all
    float softmax_scale;  // factor on q.k
    float softcap;        // scores become softcap * tanh(score / softcap); 0 is none
    DType dtype;
    CacheType cache;
};
// Independent of the context: splits are bounded by the number of CTAs that the GPU holds.
size_t decode_workspace_bytes(int max_sequences, int num_heads, int num_kv_heads, int head_dim);
cudaError_t decode_attention(DecodeParams const& params, cudaStream_t stream);

// Attention of a step's chunks: each query to its sequence's history in the pool, and causally to the chunk itself,
// whose K and V are taken as they are, not as the pool holds them. A sequence without tokens in the step writes
// nothing.
struct PrefillParams {
    void const* q;  // [num_tokens, num_heads, head_dim] of dtype: rotated as the keys are
    void const* k;  // [num_tokens, num_kv_heads, head_dim] of dtype: the chunk's own, as kv_write leaves them
    void const* v;  // [num_tokens, num_kv_heads, head_dim] of dtype
    void* out;      // [num_tokens, num_heads, head_dim] of dtype
    int32_t const* last_token_ids;   // [num_sequences]: inclusive prefix sum of the tokens per sequence
    int32_t const* sequence_length;  // [num_sequences]: KV length with this step's tokens
    float const* sinks;              // [num_heads]: a learned logit that takes its share of the softmax; or null
    PagedPool pool;
    int num_tokens;
    int num_sequences;
    int num_heads;
    int head_dim;         // 64, 96, 128, 256
    int window;           // keys that a query sees, its own among them; 0 is all
    float softmax_scale;  // factor on q.k
    float softcap;        // scores become softcap * tanh(score / softcap); 0 is none
    DType dtype;
    CacheType cache;
};
cudaError_t prefill_attention(PrefillParams const& params, cudaStream_t stream);

// A token whose logit changes before the choice. Each token at most once in a sequence's list.
struct ListedToken {
    int32_t token;
    int32_t count;  // in the text so far; kBanned: the token may not come
    float logit;    // scratch: what the kernel puts back
};
constexpr int kBanned = -1;

enum class Draw : int32_t {
    kNothing = 0,       // token -1
    kGreedy = 1,        // the likeliest token, the first of equals
    kByToken = 2,       // of all tokens, cumulated in their order
    kByLikelihood = 3,  // of those that top_k and top_p leave, cumulated from the likeliest on, equals by token
};

// How to choose one sequence's next token, as saw_trtllm/runtime/sampling.py says.
struct SampleRow {
    uint64_t seed;
    uint64_t index;  // number of the draw
    double temperature;
    double top_p;  // below 1: keep the likeliest tokens that hold this share
    double repetition_penalty;
    double presence_penalty;
    double frequency_penalty;
    ListedToken* listed;  // [num_listed]: the banned tokens, and where there are penalties those of prompt and text
    int32_t num_listed;
    int32_t top_k;  // 0: all
    Draw draw;
    int32_t wants_logprob;
};

// The next token of each sequence, in one launch. What is chosen depends neither on the other rows nor on their number.
struct SampleParams {
    float* logits;            // [*, vocab_size]; changed for the listed tokens while the kernel runs, and put back
    int32_t const* row_ends;  // [num_rows]: row i draws from row row_ends[i] - 1 of the logits; or null: from row i
    SampleRow const* rows;    // [num_rows]
    int32_t* tokens;          // [num_rows]
    double* logprobs;  // [num_rows]: log-probability under the model, before penalties and cuts, of those that want it
    int num_rows;
    int vocab_size;  // at most kMaxVocab
};
constexpr int kMaxVocab = 1 << 18;
cudaError_t sample(SampleParams const& params, cudaStream_t stream);

// Input ids of -1 - j become the token of row j of the last sample().
cudaError_t resolve_tokens(int32_t* input_ids, int num_tokens, int32_t const* tokens, cudaStream_t stream);

// Rows of a table of 16-bit numbers: out[i] is table[rows[i]], or zeros where there is no such row.
// table [num_rows, width], rows [num_tokens], out [num_tokens, width]: table and out on multiples of 16 bytes.
cudaError_t lookup(void const* table, int32_t const* rows, void* out, int num_tokens, int num_rows, int width,
                   cudaStream_t stream);

// y = x / rms(x) · weight of each head of each row, in fp32 and rounded once; heads that have no weight stay as they
// are. With a residual the rows are x + residual, rounded. Tensors lie on multiples of 16 bytes.
struct RmsNormParams {
    void const* x;         // [num_rows, num_heads, width] of dtype
    void const* residual;  // the same; or null
    float const* weight;   // [num_normed, width]
    void* y;               // as x
    void* sum;             // as x: x + residual, where there is one
    int num_rows;
    int num_heads;
    int num_normed;
    int width;
    float epsilon;  // added to the mean square
    DType dtype;
};
cudaError_t rms_norm(RmsNormParams const& params, cudaStream_t stream);

// y = a · sigmoid(a) · b, in fp32 and rounded once: count numbers each, on multiples of 16 bytes.
cudaError_t silu_mul(void const* a, void const* b, void* y, size_t count, DType dtype, cudaStream_t stream);

}  // namespace saw
