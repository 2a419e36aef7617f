// The kernel of dequantize(): rows of a weight in 16 bits.
#pragma once

#include "saw/quantized_gemm/weights.cuh"

namespace saw {

// A CTA for a block of a chunk. It turns the block around in shared memory, so that it stores whole lines.
template <typename T, WeightType W, int Group>
__global__ void __launch_bounds__(128) dequantize_kernel(DequantizeParams p) {
    using Layout = WeightLayout<W>;
    constexpr int kStride = kChunk + 8;  // 16-bit numbers: rows begin four banks apart
    __shared__ __align__(16) T rows[kBlockRows * kStride];
    PackedWeight const& weight = p.weight;
    int const warp = int(threadIdx.x) / 32, lane = int(threadIdx.x) % 32, g = lane / 4, t = lane % 4;
    int const chunk = int(blockIdx.x), chunks = int(gridDim.x);
    size_t const at = (size_t(p.first_row) / kBlockRows + blockIdx.y) * chunks + chunk;
    auto const* const scales =
        reinterpret_cast<uint2 const*>(weight.scales) + at * (Layout::template kScaleBytes<Group> / 8);
    uint32_t words[Layout::kLaneWords];
    load_words<W>(static_cast<uint8_t const*>(weight.values) + at * Layout::kBlockBytes + warp * Layout::kWarpBytes,
                  words);
#pragma unroll
    for (int pair = 0; pair < kChunk / 32; ++pair) {
        RowScales<T, W> const of(scales[pair * 32 / Group * (kBlockRows / 2) + warp * 8 + g]);
        uint32_t a[2][4];
        of.unpack(words + pair * Layout::kPairWords, a);
#pragma unroll
        for (int i = 0; i < 8; ++i) {
            float2 const x = unpack_pair<T>(a[i / 4][i % 4]);
            float const scale = i % 2 == 0 ? of.scale : of.scale_8;
            int const row = warp * kWarpRows + g + i % 2 * 8, input = pair * 32 + i / 4 * 16 + i % 4 / 2 * 8 + 2 * t;
            *reinterpret_cast<uint32_t*>(rows + row * kStride + input) = pack_pair<T>(x.x * scale, x.y * scale);
        }
    }
    __syncthreads();
    constexpr int kPieces = kChunk / 8;
    for (int i = int(threadIdx.x); i < kBlockRows * kPieces; i += int(blockDim.x)) {
        int const row = i / kPieces, input = chunk * kChunk + i % kPieces * 8, to = int(blockIdx.y) * kBlockRows + row;
        if (to >= p.num_rows || input >= weight.in_features) continue;
        *reinterpret_cast<uint4*>(static_cast<T*>(p.y) + size_t(to) * weight.in_features + input) =
            *reinterpret_cast<uint4 const*>(rows + row * kStride + i % kPieces * 8);
    }
}

}  // namespace saw
