// The kernels that make rows of e4m3 numbers: of activations, and of a packed weight.
#pragma once

#include "saw/common/vec.cuh"
#include "saw/quantized_gemm/weights.cuh"

namespace saw {

constexpr float kLargestFloat8 = 448.0f;
constexpr int kQuantizeThreads = 256;

// A CTA for a row. A thread reads again what it has looked at, which it finds in L1.
template <typename T>
__global__ void __launch_bounds__(kQuantizeThreads) quantize_rows_kernel(QuantizeRowsParams p) {
    __shared__ float of_warps[kQuantizeThreads / 32];
    auto const* const x = static_cast<uint4 const*>(p.x) + size_t(blockIdx.x) * (p.width / 8);
    float largest = 0.0f, numbers[8];
    for (int i = int(threadIdx.x); i < p.width / 8; i += kQuantizeThreads) {
        unpack_chunk<T>(x[i], numbers);
        for (float number : numbers) largest = fmaxf(largest, fabsf(number));
    }
    for (int i = 16; i > 0; i /= 2) largest = fmaxf(largest, __shfl_xor_sync(~0u, largest, i));
    if (threadIdx.x % 32 == 0) of_warps[threadIdx.x / 32] = largest;
    __syncthreads();
    for (float of_warp : of_warps) largest = fmaxf(largest, of_warp);
    float const scale = largest > 0.0f ? __fdiv_rn(largest, kLargestFloat8) : 1.0f;
    if (threadIdx.x == 0) p.y.scales[blockIdx.x] = scale;
    auto* const y = static_cast<uint2*>(p.y.values) + size_t(blockIdx.x) * (p.width / 8);
    for (int i = int(threadIdx.x); i < p.width / 8; i += kQuantizeThreads) {
        unpack_chunk<T>(x[i], numbers);
        uint32_t pairs[4];
        for (int j = 0; j < 4; ++j)
            pairs[j] = __nv_cvt_float2_to_fp8x2(
                {__fdiv_rn(numbers[2 * j], scale), __fdiv_rn(numbers[2 * j + 1], scale)}, __NV_SATFINITE, __NV_E4M3);
        y[i] = {pairs[0] | pairs[1] << 16, pairs[2] | pairs[3] << 16};
    }
}

// A CTA for a block of a chunk, as of dequantize_kernel.
static __global__ void __launch_bounds__(128) unpack_rows_kernel(UnpackRowsParams p) {
    constexpr auto kType = WeightType::kFloat8;
    using Layout = WeightLayout<kType>;
    constexpr int kStride = kChunk + 16;  // rows begin four banks apart
    __shared__ __align__(16) uint8_t rows[kBlockRows * kStride];
    PackedWeight const& weight = p.weight;
    int const warp = int(threadIdx.x) / 32, lane = int(threadIdx.x) % 32, g = lane / 4, t = lane % 4;
    int const chunk = int(blockIdx.x), chunks = int(gridDim.x);
    size_t const at = (size_t(p.first_row) / kBlockRows + blockIdx.y) * chunks + chunk;
    uint32_t words[Layout::kLaneWords];
    load_words<kType>(static_cast<uint8_t const*>(weight.values) + at * Layout::kBlockBytes + warp * Layout::kWarpBytes,
                      words);
    // A word has of a step a pair of inputs in row g, and below in row g + 8.
#pragma unroll
    for (int i = 0; i < Layout::kLaneWords; ++i)
#pragma unroll
        for (int h = 0; h < 2; ++h)
            *reinterpret_cast<uint16_t*>(rows + (warp * kWarpRows + g + 8 * h) * kStride + i * 8 + 2 * t) =
                uint16_t(words[i] >> 16 * h);
    __syncthreads();
    int const first = int(blockIdx.y) * kBlockRows;
    if (int const row = int(threadIdx.x); chunk == 0 && row < kBlockRows && first + row < p.num_rows)
        p.y.scales[first + row] = bits_as<float>(
            weight.scales[at * kBlockRows + row / kWarpRows * kWarpRows + row % 8 * 2 + row % kWarpRows / 8]);
    constexpr int kPieces = kChunk / 16;
    for (int i = int(threadIdx.x); i < kBlockRows * kPieces; i += int(blockDim.x)) {
        int const row = i / kPieces, input = chunk * kChunk + i % kPieces * 16;
        if (first + row >= p.num_rows || input >= weight.in_features) continue;
        *reinterpret_cast<uint4*>(static_cast<uint8_t*>(p.y.values) + size_t(first + row) * weight.in_features +
                                  input) = *reinterpret_cast<uint4 const*>(rows + row * kStride + i % kPieces * 16);
    }
}

}  // namespace saw
