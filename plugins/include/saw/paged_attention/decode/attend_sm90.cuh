// Decode: the arithmetic of a tile, on codes as they lie in shared memory.
// A part of pipeline_sm90.cuh, which includes it.
#pragma once

#include "saw/common/vec.cuh"
#include "saw/paged_attention/decode/pipeline_sm90.cuh"

namespace saw {

// Q as the B operand: query g of each tile of 8, the channels of words t, t + 4, ... of K.
template <typename Config>
template <typename T>
__device__ void DecodeSm90Kernel<Config>::begin_sequence() {
    DecodeCursor const& c = shared.cursors[which];
    length = c.length;
    first_seen = p.window > 0 ? length - p.window : 0;
#pragma unroll
    for (int n = 0; n < Config::kQueryTiles; ++n) {
        int const query = n * 8 + g;
        T const* row = static_cast<T const*>(p.q) +
                       (size_t(c.sequence) * p.num_heads + kv_head * group + query) * Config::kHeadDim;
        float total = 0.0f;
#pragma unroll
        for (int j = 0; j < Keys::kSteps; ++j) {
            typename Keys::Channels bits = {};
            if (query < group)
                bits = *reinterpret_cast<typename Keys::Channels const*>(row + (t + 4 * j) * Keys::kOfWord);
            T const* x = reinterpret_cast<T const*>(&bits);
            float q[Keys::kOfWord];
#pragma unroll
            for (int i = 0; i < Keys::kOfWord; ++i) {
                // bf16 reaches farther than fp16; such a query is beyond any softmax.
                q[i] = fminf(fmaxf(to_float(x[i]), -65504.0f), 65504.0f);
                total += q[i];
            }
            Keys::pack(q, q_frag[n][j]);
        }
        total += __shfl_xor_sync(~0u, total, 1);
        total += __shfl_xor_sync(~0u, total, 2);
#pragma unroll
        for (int i = 0; i < 2; ++i) {
            q_sum[n][i] = __shfl_sync(~0u, total, (2 * t + i) * 4) * score_scale();
            query_max[n][i] = kNoMax;
            query_sum[n][i] = query_lo[n][i] = 0.0f;
        }
#pragma unroll
        for (int j = 0; j < Config::kValueSteps; ++j)
#pragma unroll
            for (int m = 0; m < 4; ++m)
#pragma unroll
                for (int i = 0; i < 4; ++i) out[n][j][m][i] = 0.0f;
    }
}

// Scores in, P times V's scale out, both in s; the softmax's sums are kept up on the way.
template <typename Config>
template <typename T>
__device__ void DecodeSm90Kernel<Config>::softmax_update(int token, bool masked, __half2 const* key_tails,
                                                         __half2 const* value_tails, Scores& s) {
    constexpr int kKeyStep = Config::kSubtileTokens * Keys::kRowWords;
    constexpr int kValueStep = Config::kSubtileTokens * Config::kValueRowWords;
    float log_scale[Config::kTogether][2], inverse[Config::kTogether][2], lo_over_scale[Config::kTogether][2];  // of V
#pragma unroll
    for (int u = 0; u < Config::kTogether; ++u) {
#pragma unroll
        for (int r = 0; r < 2; ++r) {
            float2 const k = __half22float2(key_tails[u * kKeyStep + r * Keys::kRowWords]);
            float2 const v = __half22float2(value_tails[u * kValueStep + r * Config::kValueRowWords]);
            log_scale[u][r] = log2_fast(v.x);
            inverse[u][r] = reciprocal_fast(v.x);
            lo_over_scale[u][r] = v.y * inverse[u][r];
            float const k_scale = k.x * (kCodeUnit * score_scale());
#pragma unroll
            for (int n = 0; n < Config::kQueryTiles; ++n)
#pragma unroll
                for (int i = 0; i < 2; ++i) {
                    float& x = s[u][n][2 * r + i];
                    x = fmaf(x, k_scale, fmaf(k.y, q_sum[n][i], log_scale[u][r]));
                }
        }
        if (p.softcap > 0.0f) cap(s[u], log_scale[u]);
        if (masked) {
#pragma unroll
            for (int r = 0; r < 2; ++r) {
                int const at = token + u * Config::kSubtileTokens + r;
                if (at < length && at >= first_seen) continue;
                // What lies there may be anything, NaN too.
                inverse[u][r] = lo_over_scale[u][r] = 0.0f;
#pragma unroll
                for (int n = 0; n < Config::kQueryTiles; ++n) s[u][n][2 * r] = s[u][n][2 * r + 1] = -INFINITY;
            }
        }
    }
    bool lags = false;
#pragma unroll
    for (int u = 0; u < Config::kTogether; ++u)
#pragma unroll
        for (int n = 0; n < Config::kQueryTiles; ++n)
#pragma unroll
            for (int i = 0; i < 4; ++i) lags |= s[u][n][i] - query_max[n][i % 2] > kMaxLag;
    if (__any_sync(~0u, lags)) update_max(s);
#pragma unroll
    for (int u = 0; u < Config::kTogether; ++u)
#pragma unroll
        for (int n = 0; n < Config::kQueryTiles; ++n)
#pragma unroll
            for (int i = 0; i < 4; ++i) {
                float weight = exp2_fast(s[u][n][i] - query_max[n][i % 2]);
                // As it will be multiplied: an error of P is one of p v then, not of p times a code, which is larger.
                // Of bf16 activations neither is seen.
                if constexpr (std::is_same_v<T, __half>) weight = to_half_bits(weight);
                query_sum[n][i % 2] = fmaf(weight, inverse[u][i / 2], query_sum[n][i % 2]);
                query_lo[n][i % 2] = fmaf(weight, lo_over_scale[u][i / 2], query_lo[n][i % 2]);
                s[u][n][i] = weight;
            }
}

// softcap tanh(score / softcap), in units of log2 and with V's scale in them: tanh(x) = 1 - 2 / (exp(2 x) + 1).
template <typename Config>
__device__ void DecodeSm90Kernel<Config>::cap(float (&s)[Config::kQueryTiles][4], float const (&log_scale)[2]) const {
    float const inner = 2.0f / p.softcap, outer = p.softcap * kLog2e;
#pragma unroll
    for (int n = 0; n < Config::kQueryTiles; ++n)
#pragma unroll
        for (int i = 0; i < 4; ++i) {
            float const e = exp2_fast((s[n][i] - log_scale[i / 2]) * inner);
            s[n][i] = outer - 2.0f * outer * reciprocal_fast(e + 1.0f) + log_scale[i / 2];
        }
}

// Raise the references to the maximum.
template <typename Config>
__device__ void DecodeSm90Kernel<Config>::update_max(Scores const& s) {
#pragma unroll
    for (int n = 0; n < Config::kQueryTiles; ++n)
#pragma unroll
        for (int i = 0; i < 2; ++i) {
            float top = query_max[n][i];
#pragma unroll
            for (int u = 0; u < Config::kTogether; ++u) top = fmaxf(top, fmaxf(s[u][n][i], s[u][n][2 + i]));
#pragma unroll
            for (int d = 4; d < 32; d *= 2) top = fmaxf(top, __shfl_xor_sync(~0u, top, d));
            float const rescale = exp2_fast(query_max[n][i] - top);
            query_max[n][i] = top;
            query_sum[n][i] *= rescale;
            query_lo[n][i] *= rescale;
#pragma unroll
            for (int j = 0; j < Config::kValueSteps; ++j)
#pragma unroll
                for (int m = 0; m < 4; ++m) {
                    out[n][j][m][i] *= rescale;
                    out[n][j][m][2 + i] *= rescale;
                }
        }
}

// Codes of V times P, transposed: rows are dims, columns queries. Thread (g, t) holds words g, g + 8, ... of four
// tokens, so out[n][j][m] is dims 2m (i = 0, 1) and 2m + 1 (i = 2, 3, times 16) of word g + 8 j for queries 2t and 2t
// + 1.
template <typename Config>
__device__ void DecodeSm90Kernel<Config>::accumulate(uint32_t const* values,
                                                     uint32_t const (&prob)[Config::kQueryTiles][2]) {
#pragma unroll
    for (int j = 0; j < Config::kValueSteps; ++j) {
        // A row whose words are no multiple of 8 is read twice in its last step; the copies are never written.
        int const word = Config::kWords % 8 == 0 ? g + 8 * j : min(g + 8 * j, Config::kWords - 1);
        constexpr int kRow = Config::kValueRowWords;
        uint32_t const* row = values + 8 * t * kRow + word;
        uint32_t const a = row[0], c = row[kRow], b = row[4 * kRow], d = row[5 * kRow];
#pragma unroll
        for (int half = 0; half < 2; ++half) {
            // Four codes of tokens 8t, 8t + 4 side by side, and of the tokens after these.
            uint32_t const selector = half ? 0x7632 : 0x5410;
            uint32_t x = __byte_perm(a, b, selector), y = __byte_perm(c, d, selector);
            constexpr uint32_t kEven = 0x000f000f, kOdd = 0x00f000f0;
#pragma unroll
            for (int m = 2 * half; m < 2 * half + 2; ++m) {
#pragma unroll
                for (int n = 0; n < Config::kQueryTiles; ++n)
                    mma_16x8x16(out[n][j][m], x & kEven, x & kOdd, y & kEven, y & kOdd, prob[n][0], prob[n][1]);
                x >>= 8;
                y >>= 8;
            }
        }
    }
}

// The tokens of rows row + 4 i + {0, 1}, and of those 64 after them, of a stage whose first token is `position`.
template <typename Config>
template <typename T>
__device__ void DecodeSm90Kernel<Config>::round(int position, uint8_t const* stage, int row) {
    constexpr int kKeyStep = Config::kSubtileTokens * Keys::kRowWords;
    constexpr int kValueStep = Config::kSubtileTokens * Config::kValueRowWords;
    auto const* const words = reinterpret_cast<uint32_t const*>(stage);
    uint32_t const* const keys = words + row * Keys::kRowWords;
    uint32_t const* const values = words + row * Config::kValueRowWords + Config::kKeyTileBytes / 4;
    Scores s;
#pragma unroll
    for (int u = 0; u < Config::kTogether; ++u) Keys::score(keys + u * kKeyStep, g, t, q_frag, s[u]);
    bool const masked = position + Config::kTileTokens > length || position < first_seen;
    softmax_update<T>(position + row + 4 * g, masked,
                      reinterpret_cast<__half2 const*>(keys + 4 * g * Keys::kRowWords + Keys::kWords),
                      reinterpret_cast<__half2 const*>(values + 4 * g * Config::kValueRowWords + Config::kWords), s);
#pragma unroll
    for (int u = 0; u < Config::kTogether; ++u) {
        uint32_t prob[Config::kQueryTiles][2];
#pragma unroll
        for (int n = 0; n < Config::kQueryTiles; ++n) {
            prob[n][0] = transpose_8x8(pack_half2(s[u][n][0], s[u][n][1]));
            prob[n][1] = transpose_8x8(pack_half2(s[u][n][2], s[u][n][3]));
        }
        accumulate(values + u * kValueStep, prob);
    }
}

}  // namespace saw
