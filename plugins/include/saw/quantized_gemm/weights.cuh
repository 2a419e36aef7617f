// Weights of 4 and 8 bits as the operand A of the tensor cores: 16 rows by 16 inputs a step.
//
// 16 rows of a chunk belong to a warp: its lane 4 g + t has of each step rows g and g + 8, inputs 2t, 2t + 1, 2t + 8
// and 2t + 9, as mma.m16n8k16 and a warp of wgmma.m64nNk16 want them. What a lane has of four steps of INT4 or of two
// of FP8 lies together, 16 bytes, so that a warp reads 512 bytes at once.
#pragma once

#include <cuda_fp8.h>

#include "saw/common/ptx.cuh"
#include "saw/common/vec.cuh"
#include "saw/quantized_gemm/params.h"

namespace saw {

constexpr int kWarpRows = 16;

template <WeightType W>
struct WeightLayout {
    static constexpr int kPairWords = W == WeightType::kInt4 ? 2 : 4;  // of a lane, for two steps
    static constexpr int kLaneWords = kChunk / 32 * kPairWords;        // these, and what follows, for a chunk
    static constexpr int kWarpBytes = 32 * 4 * kLaneWords;
    static constexpr int kBlockBytes = kBlockRows / kWarpRows * kWarpBytes;
    template <int Group>
    static constexpr int kScaleBytes = kChunk / Group * kBlockRows * 4;
};

template <typename To, typename From>
__device__ inline To bits_as(From from) {
    return reinterpret_cast<To const&>(from);
}

// What is subtracted from INT4's codes of a row, in both halves of a word. That is exact, as is all before the scale.
template <typename T>
struct ZeroPoint;

// fp16 counts in ones from 1024 on: 0x6400 | code is 1024 + code, and with the code four bits higher 1024 + 16 code.
// Then -64 - zero, which counts in sixteenths, is added to a sixteenth.
template <>
struct ZeroPoint<__half> {
    __half2 low, high;
    __device__ explicit ZeroPoint(uint32_t zero)
        : low(bits_as<__half2>((0x6400u + zero) * 0x10001u)),
          high(bits_as<__half2>((0xd400u + (zero << 4)) * 0x10001u)) {}
};

// bf16 counts in ones from 128 to 256.
template <>
struct ZeroPoint<__nv_bfloat16> {
    __nv_bfloat162 low;
    __device__ explicit ZeroPoint(uint32_t zero) : low(bits_as<__nv_bfloat162>((0x4300u + zero) * 0x10001u)) {}
};

__device__ inline uint32_t masked_or(uint32_t x, uint32_t mask, uint32_t with) {
    uint32_t y;
    asm("lop3.b32 %0, %1, %2, %3, 0xea;" : "=r"(y) : "r"(x), "r"(mask), "r"(with));
    return y;
}

// A step of codes: in nibbles 0, 4 are inputs 2t, 2t + 1 of row g, in 1, 5 inputs 2t + 8, 2t + 9, in 2, 6 and 3, 7
// those of row g + 8.
__device__ inline void unpack_int4(uint32_t word, ZeroPoint<__half> const& zero, ZeroPoint<__half> const& zero_8,
                                   uint32_t (&a)[4]) {
    auto const low = [](uint32_t x, ZeroPoint<__half> const& z) {
        return bits_as<uint32_t>(__hsub2(bits_as<__half2>(masked_or(x, 0x000f000f, 0x64006400)), z.low));
    };
    auto const high = [](uint32_t x, ZeroPoint<__half> const& z) {
        __half2 const code = bits_as<__half2>(masked_or(x, 0x00f000f0, 0x64006400));
        return bits_as<uint32_t>(__hfma2(code, bits_as<__half2>(0x2c002c00u), z.high));
    };
    a[0] = low(word, zero);
    a[2] = high(word, zero);
    a[1] = low(word >> 8, zero_8);
    a[3] = high(word >> 8, zero_8);
}

__device__ inline void unpack_int4(uint32_t word, ZeroPoint<__nv_bfloat16> const& zero,
                                   ZeroPoint<__nv_bfloat16> const& zero_8, uint32_t (&a)[4]) {
    auto const low = [](uint32_t x, ZeroPoint<__nv_bfloat16> const& z) {
        return bits_as<uint32_t>(__hsub2(bits_as<__nv_bfloat162>(masked_or(x, 0x000f000f, 0x43004300)), z.low));
    };
    a[0] = low(word, zero);
    a[2] = low(word >> 4, zero);
    a[1] = low(word >> 8, zero_8);
    a[3] = low(word >> 12, zero_8);
}

// Four e4m3 numbers to two pairs.
template <typename T>
__device__ inline void unpack_float8(uint32_t word, uint32_t& pair, uint32_t& next) {
    if constexpr (std::is_same_v<T, __half>) {
        auto const convert = [](uint32_t x) {
            return bits_as<uint32_t>(__half2(__nv_cvt_fp8x2_to_halfraw2(__nv_fp8x2_storage_t(x), __NV_E4M3)));
        };
        pair = convert(word);
        next = convert(word >> 16);
    } else {
        // Its exponent as bf16's, which is biased by 120 more; subnormal numbers are such in both.
        auto const convert = [](uint32_t bytes) {
            uint32_t const scaled = (bytes & 0x80008000u) | ((bytes >> 4) & 0x07f007f0u);
            __nv_bfloat162 const factor = bits_as<__nv_bfloat162>(0x7b807b80u);  // 2^120
            return bits_as<uint32_t>(__hmul2(bits_as<__nv_bfloat162>(scaled), factor));
        };
        pair = convert(__byte_perm(word, 0, 0x1404));
        next = convert(__byte_perm(word, 0, 0x3424));
    }
}

// Scales of rows g and g + 8, and what else unpacking needs.
template <typename T, WeightType W>
struct RowScales {
    float scale, scale_8;
    __device__ explicit RowScales(uint2 words) : scale(bits_as<float>(words.x)), scale_8(bits_as<float>(words.y)) {}

    // Two steps.
    __device__ void unpack(uint32_t const* words, uint32_t (*a)[4]) const {
        unpack_float8<T>(words[0], a[0][0], a[0][1]);
        unpack_float8<T>(words[1], a[0][2], a[0][3]);
        unpack_float8<T>(words[2], a[1][0], a[1][1]);
        unpack_float8<T>(words[3], a[1][2], a[1][3]);
    }
};

template <typename T>
struct RowScales<T, WeightType::kInt4> {
    static constexpr uint32_t kZero = 31;
    float scale, scale_8;
    ZeroPoint<T> zero, zero_8;
    __device__ explicit RowScales(uint2 words)
        : scale(bits_as<float>(words.x & ~kZero)),
          scale_8(bits_as<float>(words.y & ~kZero)),
          zero(words.x & kZero),
          zero_8(words.y & kZero) {}

    // Two steps.
    __device__ void unpack(uint32_t const* words, uint32_t (*a)[4]) const {
        unpack_int4(words[0], zero, zero_8, a[0]);
        unpack_int4(words[1], zero, zero_8, a[1]);
    }
};

// What a lane has of a chunk, from where its warp's begins.
template <WeightType W>
__device__ inline void load_words(void const* warp_bytes, uint32_t (&words)[WeightLayout<W>::kLaneWords]) {
    auto const* const from = static_cast<uint4 const*>(warp_bytes) + threadIdx.x % 32;
#pragma unroll
    for (int i = 0; i < WeightLayout<W>::kLaneWords / 4; ++i) {
        uint4 const piece = from[i * 32];
        words[4 * i] = piece.x;
        words[4 * i + 1] = piece.y;
        words[4 * i + 2] = piece.z;
        words[4 * i + 3] = piece.w;
    }
}

}  // namespace saw
