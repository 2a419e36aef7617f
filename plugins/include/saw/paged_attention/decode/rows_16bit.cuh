// Decode: the arithmetic on rows of the activations' own 16-bit type, the baseline.
#pragma once

#include "saw/common/vec.cuh"
#include "saw/paged_attention/decode/softmax.cuh"

namespace saw {

// A warp's work on tiles of 16-bit rows for up to 8 * QueryTiles queries, 16 tokens at a time.
template <typename Type, int HeadDim, int QueryTiles>
class Rows16Bit {
  public:
    using T = Type;
    static constexpr int kHeadDim = HeadDim;
    static constexpr int kQueryTiles = QueryTiles;
    static constexpr int kRowBytes = 2 * HeadDim, kKeyRowBytes = kRowBytes, kValueRowBytes = kRowBytes;
    // A row's 16-byte chunks are permuted on their way to shared memory, where ldmatrix takes the same chunk of 8 rows
    // that lie a multiple of 64 bytes apart.
    // A row beyond a sequence may hold NaN, which times a P of 0 is no 0.
    static constexpr bool kNeedsZeros = true;

    static __device__ int place(int chunk) {
        int const row = chunk / kRowChunks;
        return row * kRowChunks + swizzled(row, chunk % kRowChunks);
    }

    __device__ void begin(T const* q, int group, float) {
        int const g = threadIdx.x % 32 / 4, t = threadIdx.x % 4;
        softmax.reset();
#pragma unroll
        for (int n = 0; n < QueryTiles; ++n)
#pragma unroll
            for (int x = 0; x < HeadDim / 8; ++x) {
                int const query = n * 8 + g;
                q_frag[n][x / 2][x % 2] =
                    query < group ? *reinterpret_cast<uint32_t const*>(q + query * HeadDim + x * 8 + 2 * t) : 0;
            }
    }

    template <int TileTokens>
    __device__ void attend(uint8_t const* keys, uint8_t const* values, int position, DecodeView const& view) {
        bool const masked = position + TileTokens > view.length || position < view.first_seen;
#pragma unroll 1
        for (int row = 0; row < TileTokens; row += 16)
            round(keys + row * kRowBytes, values + row * kRowBytes, position + row, masked, view);
    }

    static __device__ int scratch_dim(int query, int dim) { return dim ^ ((query & 6) << 2); }

    __device__ void store_sums(float* scratch, float* max, float* sum, int group);

  private:
    static constexpr int kRowChunks = kRowBytes / 16;
    static constexpr int kSteps = HeadDim / 16;

    // Accumulator a: rows are dims 16 a to 16 a + 15.
    DecodeSoftmax<QueryTiles, kSteps> softmax;
    uint32_t q_frag[QueryTiles][kSteps][2];

    static __device__ int swizzled(int row, int chunk) {
        return kRowChunks % 8 == 0 ? chunk ^ (row & 7) : chunk ^ (row >> 1 & 3);
    }
    static_assert(kRowChunks % 8 == 0 || kRowChunks % 8 == 4, "8 rows of any chunk lie in different banks");

    __device__ void round(uint8_t const* keys, uint8_t const* values, int token, bool masked, DecodeView const& view);
};

template <typename Type, int HeadDim, int QueryTiles>
__device__ void Rows16Bit<Type, HeadDim, QueryTiles>::round(uint8_t const* keys, uint8_t const* values, int token,
                                                            bool masked, DecodeView const& view) {
    int const lane = threadIdx.x % 32, g = lane / 4;
    int const row = lane % 8, low = lane / 8 % 2, high = lane / 16;
    float s[1][QueryTiles][4] = {};
#pragma unroll
    for (int x = 0; x < kSteps; ++x) {
        uint32_t k[4];  // tokens 0..7 and 8..15 of 8 dims, and of the next 8
        load_matrices(k, keys + (low * 8 + row) * kRowBytes + swizzled(row, 2 * x + high) * 16);
#pragma unroll
        for (int n = 0; n < QueryTiles; ++n)
            mma_16x8x16<T>(s[0][n], k[0], k[1], k[2], k[3], q_frag[n][x][0], q_frag[n][x][1]);
    }
#pragma unroll
    for (int r = 0; r < 2; ++r) {
        int const at = token + g + 8 * r;
        bool const hidden = masked && (at >= view.length || at < view.first_seen);
#pragma unroll
        for (int n = 0; n < QueryTiles; ++n)
#pragma unroll
            for (int i = 0; i < 2; ++i) {
                float& x = s[0][n][2 * r + i];
                x *= view.score_scale;
                if (view.softcap > 0.0f) x = cap_score(x, view.softcap);
                if (hidden) x = -INFINITY;
            }
    }
    if (softmax.lags(s)) {
        float rescale[QueryTiles][2];
        softmax.update_max(s, rescale);
    }
    uint32_t prob[QueryTiles][2];
#pragma unroll
    for (int n = 0; n < QueryTiles; ++n)
#pragma unroll
        for (int r = 0; r < 2; ++r) {
            T pair[2];
#pragma unroll
            for (int i = 0; i < 2; ++i) {
                float const weight = exp2_fast(s[0][n][2 * r + i] - softmax.max[n][i]);
                softmax.sum[n][i] += weight;
                pair[i] = from_float<T>(weight);
            }
            prob[n][r] = transpose_8x8(reinterpret_cast<uint32_t const&>(pair));
        }
#pragma unroll
    for (int a = 0; a < kSteps; ++a) {
        uint32_t v[4];  // 8 dims and the next 8 of tokens 0..7, and of tokens 8..15
        load_matrices_transposed(v, values + (high * 8 + row) * kRowBytes + swizzled(row, 2 * a + low) * 16);
#pragma unroll
        for (int n = 0; n < QueryTiles; ++n)
            mma_16x8x16<T>(softmax.out[n][a], v[0], v[1], v[2], v[3], prob[n][0], prob[n][1]);
    }
}

template <typename Type, int HeadDim, int QueryTiles>
__device__ void Rows16Bit<Type, HeadDim, QueryTiles>::store_sums(float* scratch, float* max, float* sum, int group) {
    int const g = threadIdx.x % 32 / 4, t = threadIdx.x % 4;
    softmax.add_lanes(softmax.sum);
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
            for (int a = 0; a < kSteps; ++a)
#pragma unroll
                for (int r = 0; r < 2; ++r)
                    scratch[query * HeadDim + scratch_dim(query, 16 * a + 8 * r + g)] = softmax.out[n][a][2 * r + i];
        }
}

}  // namespace saw
