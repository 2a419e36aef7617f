// The kernel of quantized_gemm() on GPUs without Hopper's tensor cores: few_rows_sm90.cuh in a plain version.
//
// A CTA has a block of the weight's rows and all of its chunks: two warps take turns for each 16 rows, and their sums
// are added in the end.
#pragma once

#include "saw/quantized_gemm/weights.cuh"

namespace saw {

constexpr int kSm80WarpsM = kBlockRows / kWarpRows, kSm80WarpsK = 2, kSm80Threads = 32 * kSm80WarpsM * kSm80WarpsK;

template <WeightType W, int Columns, int Group>
struct FewRowsSm80Stage {
    static constexpr int kStages = Columns > 32 ? 2 : 3;  // within the 99 KB of sm_86, 89 and 120
    static constexpr int kBlockBytes = WeightLayout<W>::kBlockBytes,
                         kScaleBytes = WeightLayout<W>::template kScaleBytes<Group>;
    static constexpr int kStride = kSm80WarpsK * kChunk * 2 + 16;  // of activations: rows begin four banks apart
    static constexpr int kScales = kSm80WarpsK * kBlockBytes, kActivations = kScales + kSm80WarpsK * kScaleBytes;
    static constexpr int kBytes = kActivations + Columns * kStride;
    // In the stages' place when they are done: columns of sums, of each warp of kSm80WarpsK.
    static constexpr int kSumStride = kBlockRows + 4, kSums = kSm80WarpsK * Columns * kSumStride * 4;
    static constexpr int kShared = kStages * kBytes > kSums ? kStages* kBytes : kSums;
    static_assert(kShared <= 99 * 1024);
};

template <typename T, WeightType W, int Columns, int Group>
__device__ inline void copy_stage(QuantizedGemmParams const& p, uint8_t* stage, int chunk, int chunks) {
    using Stage = FewRowsSm80Stage<W, Columns, Group>;
    uint32_t const to = shared_address(stage);
    auto const copy = [&](uint32_t where, void const* from, int bytes) {
        size_t const first = (size_t(blockIdx.x) * chunks + chunk) * bytes;
        int const there = min(kSm80WarpsK, chunks - chunk) * bytes;
        for (int at = int(threadIdx.x) * 16; at < there; at += kSm80Threads * 16)
            copy_async(where + at, static_cast<uint8_t const*>(from) + first + at, 16);
    };
    copy(to, p.weight.values, Stage::kBlockBytes);
    copy(to + Stage::kScales, p.weight.scales, Stage::kScaleBytes);
    constexpr int kPieces = kSm80WarpsK * kChunk / 8;
    for (int i = int(threadIdx.x); i < Columns * kPieces; i += kSm80Threads) {
        int const column = i / kPieces, row = int(blockIdx.y) * Columns + column,
                  input = chunk * kChunk + i % kPieces * 8;
        bool const there = row < p.num_rows && input < p.weight.in_features;
        copy_async(to + Stage::kActivations + column * Stage::kStride + i % kPieces * 16,
                   static_cast<T const*>(p.x) + (there ? size_t(row) * p.weight.in_features + input : 0),
                   there ? 16 : 0);
    }
}

// A warp's 16 rows of one chunk.
template <typename T, WeightType W, int Columns, int Group>
__device__ inline void multiply_chunk(uint8_t const* stage, int warp_m, int warp_k, float (&sums)[Columns / 8][4]) {
    using Stage = FewRowsSm80Stage<W, Columns, Group>;
    int const lane = int(threadIdx.x) % 32;
    uint32_t words[WeightLayout<W>::kLaneWords];
    load_words<W>(stage + warp_k * Stage::kBlockBytes + warp_m * WeightLayout<W>::kWarpBytes, words);
    auto const* const scales = reinterpret_cast<uint2 const*>(stage + Stage::kScales + warp_k * Stage::kScaleBytes);
    uint8_t const* const x =
        stage + Stage::kActivations + lane % 8 * Stage::kStride + warp_k * kChunk * 2 + lane / 8 * 16;
#pragma unroll
    for (int group = 0; group < kChunk / Group; ++group) {
        RowScales<T, W> const of(scales[(group * kSm80WarpsM + warp_m) * 8 + lane / 4]);
        float parts[Columns / 8][4] = {};
#pragma unroll
        for (int pair = group * Group / 32; pair < (group + 1) * Group / 32; ++pair) {
            uint32_t a[2][4];
            of.unpack(words + pair * WeightLayout<W>::kPairWords, a);
#pragma unroll
            for (int n = 0; n < Columns / 8; ++n) {
                uint32_t b[4];
                load_matrices(b, x + n * 8 * Stage::kStride + pair * 64);
                mma_16x8x16<T>(parts[n], a[0][0], a[0][1], a[0][2], a[0][3], b[0], b[1]);
                mma_16x8x16<T>(parts[n], a[1][0], a[1][1], a[1][2], a[1][3], b[2], b[3]);
            }
        }
#pragma unroll
        for (int n = 0; n < Columns / 8; ++n)
#pragma unroll
            for (int i = 0; i < 4; ++i) sums[n][i] += (i < 2 ? of.scale : of.scale_8) * parts[n][i];
    }
}

template <typename T, WeightType W, int Columns, int Group>
__global__ void __launch_bounds__(kSm80Threads) few_rows_sm80_kernel(QuantizedGemmParams p) {
    using Stage = FewRowsSm80Stage<W, Columns, Group>;
    extern __shared__ __align__(16) uint8_t shared[];
    int const warp = int(threadIdx.x) / 32, warp_m = warp % kSm80WarpsM, warp_k = warp / kSm80WarpsM;
    int const lane = int(threadIdx.x) % 32, g = lane / 4, t = lane % 4;
    int const chunks = (p.weight.in_features + kChunk - 1) / kChunk, count = (chunks + kSm80WarpsK - 1) / kSm80WarpsK;
    auto const copy = [&](int i) {
        if (i < count)
            copy_stage<T, W, Columns, Group>(p, shared + i % Stage::kStages * Stage::kBytes, i * kSm80WarpsK, chunks);
        end_copy_group();
    };
    for (int i = 0; i < Stage::kStages - 1; ++i) copy(i);
    float sums[Columns / 8][4] = {};
    for (int i = 0; i < count; ++i) {
        wait_for_copies<Stage::kStages - 2>();
        __syncthreads();
        copy(i + Stage::kStages - 1);
        if (i * kSm80WarpsK + warp_k < chunks)
            multiply_chunk<T, W, Columns, Group>(shared + i % Stage::kStages * Stage::kBytes, warp_m, warp_k, sums);
    }
    copy_async_wait();
    __syncthreads();
    auto* const all = reinterpret_cast<float*>(shared);
#pragma unroll
    for (int n = 0; n < Columns / 8; ++n)
#pragma unroll
        for (int i = 0; i < 4; ++i)
            all[(warp_k * Columns + n * 8 + 2 * t + i % 2) * Stage::kSumStride + warp_m * kWarpRows + g + i / 2 * 8] =
                sums[n][i];
    __syncthreads();
    int const first = int(blockIdx.y) * Columns, columns = min(p.num_rows - first, Columns);
    for (int i = int(threadIdx.x); i < columns * kBlockRows / 2; i += kSm80Threads) {
        int const column = i / (kBlockRows / 2), m = i % (kBlockRows / 2) * 2, row = int(blockIdx.x) * kBlockRows + m;
        if (row >= p.weight.out_features) continue;
        float2 y{};
        for (int k = 0; k < kSm80WarpsK; ++k) {
            auto const part = *reinterpret_cast<float2 const*>(all + (k * Columns + column) * Stage::kSumStride + m);
            y.x += part.x;
            y.y += part.y;
        }
        auto* const to = static_cast<T*>(p.y) + size_t(first + column) * p.weight.out_features + row;
        *reinterpret_cast<uint32_t*>(to) = pack_pair<T>(y.x, y.y);
    }
}

}  // namespace saw
