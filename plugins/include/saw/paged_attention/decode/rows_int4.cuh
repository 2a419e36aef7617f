// Decode: the arithmetic on rows of codes, as they lie in shared memory: K's of 4 bits or of 8, V's of 4.
//
// Nothing is dequantized: a mask is all it takes to make an exact operand of two codes (key_codes.cuh). Scale and lo
// are applied per token:
//   q.k = scale (q.code) + lo sum(q)        sum(p v) = sum((p scale) code) + sum(p lo)
// p scale is exp2(score + log2(scale)), so that whatever V's scales are, the operand of the product lies within fp16.
#pragma once

#include "saw/common/pool.h"
#include "saw/common/vec.cuh"
#include "saw/paged_attention/decode/key_codes.cuh"
#include "saw/paged_attention/decode/softmax.cuh"
#include "saw/paged_attention/decode/work_list.cuh"

namespace saw {

// A warp's work on tiles of rows of codes for up to 8 * QueryTiles queries, 16 * Together tokens at a time to hide its
// own latencies.
template <typename Type, int HeadDim, int QueryTiles, int Together, int KeyBits = 4>
class Int4Rows {
    using Keys = KeyCodes<KeyBits, HeadDim>;

  public:
    using T = Type;
    static constexpr int kHeadDim = HeadDim;
    static constexpr int kQueryTiles = QueryTiles;
    static constexpr int kKeyRowBytes = 4 * Keys::kRowWords, kValueRowBytes = int4_row_bytes(HeadDim);
    // Rows beyond a sequence may be anything: their codes are finite, and their scale and lo are masked.
    static constexpr bool kNeedsZeros = false;

    // Rows lie in shared memory as in the pool.
    static __device__ int place(int chunk) { return chunk; }

    __device__ void begin(T const* q, int group, float score_scale);

    // A tile whose first token is `position`, a multiple of 32 tokens.
    template <int TileTokens>
    __device__ void attend(uint8_t const* keys, uint8_t const* values, int position, DecodeView const& view) {
        static_assert(TileTokens % 32 == 0 && 32 % (16 * Together) == 0);
        bool const masked = position + TileTokens > view.length || position < view.first_seen;
        // 16 tokens are rows row + 4 i + {0, 1} for i in 0..7: rows 4 apart, for K, and 8 apart, for V, lie 4 and 8
        // banks apart.
#pragma unroll 1
        for (int first = 0; first < TileTokens; first += 32)
#pragma unroll
            for (int odd = 0; odd < 2; odd += Together)
                round(reinterpret_cast<uint32_t const*>(keys) + (first + 2 * odd) * Keys::kRowWords,
                      reinterpret_cast<uint32_t const*>(values) + (first + 2 * odd) * kRowWords,
                      position + first + 2 * odd, masked, view);
    }

    // Where the scratch that `store_sums` fills has a dim of a query: the lanes' banks differ.
    static __device__ int scratch_dim(int query, int dim) { return dim ^ ((query & 6)); }

    // The warp's sums go to scratch [queries, head_dim], max and sum [queries].
    __device__ void store_sums(float* scratch, float* max, float* sum, int group);

  private:
    // Of V.
    static constexpr int kRowWords = kValueRowBytes / 4;
    static constexpr int kWords = HeadDim / 8;            // of 8 codes
    static constexpr int kValueSteps = (kWords + 7) / 8;  // words of a row that a thread sums
    static_assert(kRowWords % 2 == 1, "an odd row length is what spreads rows over the banks");

    using Scores = float[Together][QueryTiles][4];

    // Accumulator 4 j + m: rows g are dims 2m of word g + 8 j, rows g + 8 dims 2m + 1, 16 times.
    DecodeSoftmax<QueryTiles, 4 * kValueSteps> softmax;
    float lo[QueryTiles][2];  // sum(p lo)
    // Q as the B operand: query g of each tile of 8, the channels of words t, t + 4, ... of K.
    uint32_t q_frag[QueryTiles][Keys::kSteps][Keys::kOperands];
    float q_sum[QueryTiles][2];  // sum(q) of queries 2t, 2t + 1, times score_scale

    __device__ void round(uint32_t const* keys, uint32_t const* values, int token, bool masked, DecodeView const& view);
    __device__ void softmax_update(int token, bool masked, __half2 const* key_tails, __half2 const* value_tails,
                                   Scores& s, DecodeView const& view);
    __device__ void accumulate(uint32_t const* values, uint32_t const (&prob)[QueryTiles][2]);
};

template <typename Type, int HeadDim, int QueryTiles, int Together, int KeyBits>
__device__ void Int4Rows<Type, HeadDim, QueryTiles, Together, KeyBits>::begin(T const* q, int group,
                                                                              float score_scale) {
    int const g = threadIdx.x % 32 / 4, t = threadIdx.x % 4;
    softmax.reset();
#pragma unroll
    for (int n = 0; n < QueryTiles; ++n) {
        int const query = n * 8 + g;
        float total = 0.0f;
#pragma unroll
        for (int j = 0; j < Keys::kSteps; ++j) {
            typename Keys::Channels bits = {};
            if (query < group)
                bits = *reinterpret_cast<typename Keys::Channels const*>(q + query * HeadDim +
                                                                         (t + 4 * j) * Keys::kOfWord);
            T const* x = reinterpret_cast<T const*>(&bits);
            float f[Keys::kOfWord];
#pragma unroll
            for (int i = 0; i < Keys::kOfWord; ++i) {
                // bf16 reaches farther than fp16; such a query is beyond any softmax.
                f[i] = fminf(fmaxf(to_float(x[i]), -65504.0f), 65504.0f);
                total += f[i];
            }
            Keys::pack(f, q_frag[n][j]);
        }
        total += __shfl_xor_sync(~0u, total, 1);
        total += __shfl_xor_sync(~0u, total, 2);
#pragma unroll
        for (int i = 0; i < 2; ++i) {
            q_sum[n][i] = __shfl_sync(~0u, total, (2 * t + i) * 4) * score_scale;
            lo[n][i] = 0.0f;
        }
    }
}

template <typename Type, int HeadDim, int QueryTiles, int Together, int KeyBits>
__device__ void Int4Rows<Type, HeadDim, QueryTiles, Together, KeyBits>::round(uint32_t const* keys,
                                                                              uint32_t const* values, int token,
                                                                              bool masked, DecodeView const& view) {
    int const g = threadIdx.x % 32 / 4;
    constexpr int kKeyStep = 2 * Keys::kRowWords, kStep = 2 * kRowWords;  // from the rows of 16 tokens to the next 16
    Scores s;
#pragma unroll
    for (int u = 0; u < Together; ++u) Keys::score(keys + u * kKeyStep, g, threadIdx.x % 4, q_frag, s[u]);
    softmax_update(token + 4 * g, masked,
                   reinterpret_cast<__half2 const*>(keys + 4 * g * Keys::kRowWords + Keys::kWords),
                   reinterpret_cast<__half2 const*>(values + 4 * g * kRowWords + kWords), s, view);
#pragma unroll
    for (int u = 0; u < Together; ++u) {
        uint32_t prob[QueryTiles][2];
#pragma unroll
        for (int n = 0; n < QueryTiles; ++n) {
            prob[n][0] = transpose_8x8(pack_half2(s[u][n][0], s[u][n][1]));
            prob[n][1] = transpose_8x8(pack_half2(s[u][n][2], s[u][n][3]));
        }
        accumulate(values + u * kStep, prob);
    }
}

// Products of codes in, P times V's scale out, both in s; the softmax's sums are kept up on the way.
template <typename Type, int HeadDim, int QueryTiles, int Together, int KeyBits>
__device__ void Int4Rows<Type, HeadDim, QueryTiles, Together, KeyBits>::softmax_update(
    int token, bool masked, __half2 const* key_tails, __half2 const* value_tails, Scores& s, DecodeView const& view) {
    constexpr int kKeyStep = 2 * Keys::kRowWords, kStep = 2 * kRowWords;
    float log_scale[Together][2], inverse[Together][2], lo_over_scale[Together][2];  // of V
#pragma unroll
    for (int u = 0; u < Together; ++u)
#pragma unroll
        for (int r = 0; r < 2; ++r) {
            float2 const k = __half22float2(key_tails[u * kKeyStep + r * Keys::kRowWords]);
            float2 const v = __half22float2(value_tails[u * kStep + r * kRowWords]);
            log_scale[u][r] = log2_fast(v.x);
            inverse[u][r] = reciprocal_fast(v.x);
            lo_over_scale[u][r] = v.y * inverse[u][r];
            float const k_scale = k.x * (kCodeUnit * view.score_scale);
            bool const hidden = masked && (token + 2 * u + r >= view.length || token + 2 * u + r < view.first_seen);
            // What lies there may be anything, NaN too.
            if (hidden) inverse[u][r] = lo_over_scale[u][r] = 0.0f;
#pragma unroll
            for (int n = 0; n < QueryTiles; ++n)
#pragma unroll
                for (int i = 0; i < 2; ++i) {
                    float& x = s[u][n][2 * r + i];
                    if (view.softcap > 0.0f) {
                        x = cap_score(fmaf(x, k_scale, k.y * q_sum[n][i]), view.softcap) + log_scale[u][r];
                    } else {
                        x = fmaf(x, k_scale, fmaf(k.y, q_sum[n][i], log_scale[u][r]));
                    }
                    if (hidden) x = -INFINITY;
                }
        }
    if (softmax.lags(s)) {
        float rescale[QueryTiles][2];
        softmax.update_max(s, rescale);
#pragma unroll
        for (int n = 0; n < QueryTiles; ++n)
#pragma unroll
            for (int i = 0; i < 2; ++i) lo[n][i] *= rescale[n][i];
    }
#pragma unroll
    for (int u = 0; u < Together; ++u)
#pragma unroll
        for (int n = 0; n < QueryTiles; ++n)
#pragma unroll
            for (int i = 0; i < 4; ++i) {
                float weight = exp2_fast(s[u][n][i] - softmax.max[n][i % 2]);
                // As in attend_sm90.cuh.
                if constexpr (std::is_same_v<Type, __half>) weight = to_half_bits(weight);
                softmax.sum[n][i % 2] = fmaf(weight, inverse[u][i / 2], softmax.sum[n][i % 2]);
                lo[n][i % 2] = fmaf(weight, lo_over_scale[u][i / 2], lo[n][i % 2]);
                s[u][n][i] = weight;
            }
}

// Codes of V times P: thread (g, t) holds words g, g + 8, ... of four tokens.
template <typename Type, int HeadDim, int QueryTiles, int Together, int KeyBits>
__device__ void Int4Rows<Type, HeadDim, QueryTiles, Together, KeyBits>::accumulate(
    uint32_t const* values, uint32_t const (&prob)[QueryTiles][2]) {
    int const g = threadIdx.x % 32 / 4, t = threadIdx.x % 4;
#pragma unroll
    for (int j = 0; j < kValueSteps; ++j) {
        // A row whose words are no multiple of 8 is read twice in its last step; the copies are never written.
        int const word = kWords % 8 == 0 ? g + 8 * j : min(g + 8 * j, kWords - 1);
        uint32_t const* row = values + 8 * t * kRowWords + word;
        uint32_t const a = row[0], c = row[kRowWords];
        uint32_t const b = row[4 * kRowWords], d = row[5 * kRowWords];
#pragma unroll
        for (int half = 0; half < 2; ++half) {
            // Four codes of tokens 8t, 8t + 4 side by side, and of the tokens after these.
            uint32_t const selector = half ? 0x7632 : 0x5410;
            uint32_t x = __byte_perm(a, b, selector), y = __byte_perm(c, d, selector);
            constexpr uint32_t kEven = 0x000f000f, kOdd = 0x00f000f0;
#pragma unroll
            for (int m = 2 * half; m < 2 * half + 2; ++m) {
#pragma unroll
                for (int n = 0; n < QueryTiles; ++n)
                    mma_16x8x16(softmax.out[n][4 * j + m], x & kEven, x & kOdd, y & kEven, y & kOdd, prob[n][0],
                                prob[n][1]);
                x >>= 8;
                y >>= 8;
            }
        }
    }
}

template <typename Type, int HeadDim, int QueryTiles, int Together, int KeyBits>
__device__ void Int4Rows<Type, HeadDim, QueryTiles, Together, KeyBits>::store_sums(float* scratch, float* max,
                                                                                   float* sum, int group) {
    int const g = threadIdx.x % 32 / 4, t = threadIdx.x % 4;
    softmax.add_lanes(softmax.sum);
    softmax.add_lanes(lo);
#pragma unroll
    for (int n = 0; n < QueryTiles; ++n)
#pragma unroll
        for (int i = 0; i < 2; ++i) {
            int const query = n * 8 + 2 * t + i;
            if (query >= group) continue;
            if (g == 0) {
                max[query] = softmax.max[n][i];
                sum[query] = softmax.sum[n][i];
            }
#pragma unroll
            for (int a = 0; a < 4 * kValueSteps; ++a) {
                int const word = g + 8 * (a / 4);
                if (kWords % 8 != 0 && word >= kWords) continue;
                float const(&x)[4] = softmax.out[n][a];
                float2 const pair =
                    make_float2(fmaf(x[i], kCodeUnit, lo[n][i]), fmaf(x[2 + i], kCodeUnit / 16, lo[n][i]));
                *reinterpret_cast<float2*>(scratch + query * HeadDim + scratch_dim(query, word * 8 + 2 * (a % 4))) =
                    pair;
            }
        }
}

}  // namespace saw
