// Conversions between fp32 and the activations' 16-bit types, and several numbers that a thread moves at once.
#pragma once

#include <cstdint>
#include <type_traits>

#include <cuda_bf16.h>
#include <cuda_fp16.h>

namespace saw {

template <typename T, int N>
struct alignas(N * sizeof(T)) Pack {
    T at[N];
};
constexpr int kWide = 8;  // 16-bit numbers: 16 bytes

__device__ inline uint32_t pack_half2(float low, float high) {
    __half2 const h = __floats2half2_rn(low, high);
    return reinterpret_cast<uint32_t const&>(h);
}

template <typename T>
__device__ inline uint32_t pack_pair(float low, float high) {
    if constexpr (std::is_same_v<T, __half>) {
        return pack_half2(low, high);
    } else {
        __nv_bfloat162 const pair = __floats2bfloat162_rn(low, high);
        return reinterpret_cast<uint32_t const&>(pair);
    }
}

template <typename T>
__device__ inline T from_float(float x) {
    if constexpr (std::is_same_v<T, __half>) {
        return __float2half_rn(x);
    } else {
        return __float2bfloat16_rn(x);
    }
}

template <typename T>
__device__ inline float to_float(T x) {
    if constexpr (std::is_same_v<T, __half>) {
        return __half2float(x);
    } else {
        return __bfloat162float(x);
    }
}

template <typename T>
__device__ inline float2 unpack_pair(uint32_t bits) {
    if constexpr (std::is_same_v<T, __half>) {
        return __half22float2(reinterpret_cast<__half2 const&>(bits));
    } else {
        return {__uint_as_float(bits << 16), __uint_as_float(bits & 0xffff0000u)};
    }
}

template <typename T>
__device__ inline void unpack_chunk(uint4 bits, float (&x)[8]) {
    uint32_t const words[4] = {bits.x, bits.y, bits.z, bits.w};
#pragma unroll
    for (int i = 0; i < 4; ++i) {
        float2 const pair = unpack_pair<T>(words[i]);
        x[2 * i] = pair.x;
        x[2 * i + 1] = pair.y;
    }
}

template <typename T>
__device__ inline uint4 pack_chunk(float const (&x)[8]) {
    return {pack_pair<T>(x[0], x[1]), pack_pair<T>(x[2], x[3]), pack_pair<T>(x[4], x[5]), pack_pair<T>(x[6], x[7])};
}

}  // namespace saw
