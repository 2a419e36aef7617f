// Decode: the running softmax of a warp, whatever its rows are made of.
#pragma once

#include "saw/common/ptx.cuh"
#include "saw/paged_attention/params.h"

namespace saw {

// What the arithmetic of a tile needs to know of the launch and the sequence.
struct DecodeView {
    float score_scale;  // softmax_scale, in units of log2
    float softcap;
    int group;       // query heads that share the KV head
    int first_seen;  // position
    int length;
};

// Scores and sums of a warp for QueryTiles tiles of 8 queries. Of 16 tokens a thread holds two, s[.][0..1] of one and
// s[.][2..3] of the other, for queries 2t and 2t + 1 of each tile. The output is transposed: out[.][a] is a 16x8
// accumulator whose rows are dims and whose columns are queries. Scores are in units of log2.
template <int QueryTiles, int Accumulators>
struct DecodeSoftmax {
    static constexpr float kNoMax = -1e30f;
    // The reference that exponents are taken against follows the maximum only when it lags by more than this: P stays
    // within fp16, and the sums need no correction for most tiles.
    static constexpr float kMaxLag = 8.0f;

    float out[QueryTiles][Accumulators][4];
    float max[QueryTiles][2], sum[QueryTiles][2];

    __device__ void reset() {
#pragma unroll
        for (int n = 0; n < QueryTiles; ++n) {
#pragma unroll
            for (int i = 0; i < 2; ++i) {
                max[n][i] = kNoMax;
                sum[n][i] = 0.0f;
            }
#pragma unroll
            for (int a = 0; a < Accumulators; ++a)
#pragma unroll
                for (int i = 0; i < 4; ++i) out[n][a][i] = 0.0f;
        }
    }

    template <int Together>
    __device__ bool lags(float const (&s)[Together][QueryTiles][4]) const {
        bool any = false;
#pragma unroll
        for (int u = 0; u < Together; ++u)
#pragma unroll
            for (int n = 0; n < QueryTiles; ++n)
#pragma unroll
                for (int i = 0; i < 4; ++i) any |= s[u][n][i] - max[n][i % 2] > kMaxLag;
        return __any_sync(~0u, any);
    }

    // Raise the references to the maximum; `rescale` is what that takes off all sums.
    template <int Together>
    __device__ void update_max(float const (&s)[Together][QueryTiles][4], float (&rescale)[QueryTiles][2]) {
#pragma unroll
        for (int n = 0; n < QueryTiles; ++n)
#pragma unroll
            for (int i = 0; i < 2; ++i) {
                float top = max[n][i];
#pragma unroll
                for (int u = 0; u < Together; ++u) top = fmaxf(top, fmaxf(s[u][n][i], s[u][n][2 + i]));
#pragma unroll
                for (int d = 4; d < 32; d *= 2) top = fmaxf(top, __shfl_xor_sync(~0u, top, d));
                rescale[n][i] = exp2_fast(max[n][i] - top);
                max[n][i] = top;
                sum[n][i] *= rescale[n][i];
#pragma unroll
                for (int a = 0; a < Accumulators; ++a) {
                    out[n][a][i] *= rescale[n][i];
                    out[n][a][2 + i] *= rescale[n][i];
                }
            }
    }

    // What each query's sum is over all lanes.
    static __device__ void add_lanes(float (&x)[QueryTiles][2]) {
#pragma unroll
        for (int n = 0; n < QueryTiles; ++n)
#pragma unroll
            for (int i = 0; i < 2; ++i)
#pragma unroll
                for (int d = 4; d < 32; d *= 2) x[n][i] += __shfl_xor_sync(~0u, x[n][i], d);
    }
};

// softcap tanh(score / softcap) with scores in units of log2: tanh(x) = 1 - 2 / (exp(2 x) + 1).
__device__ inline float cap_score(float score, float softcap) {
    float const outer = softcap * kLog2e;
    return outer - 2.0f * outer * reciprocal_fast(exp2_fast(score * (2.0f / softcap)) + 1.0f);
}

}  // namespace saw
