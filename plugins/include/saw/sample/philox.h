// Philox 4x64-10 (Salmon et al. 2011), as numpy's generators of that name count it.
#pragma once

#include <cstdint>

namespace saw {

#ifdef __CUDACC__
#define SAW_HOST_DEVICE __host__ __device__
#else
#define SAW_HOST_DEVICE
#endif

SAW_HOST_DEVICE inline uint64_t multiply_high(uint64_t a, uint64_t b) {
#ifdef __CUDA_ARCH__
    return __umul64hi(a, b);
#else
    return uint64_t((unsigned __int128)a * b >> 64);
#endif
}

// What numpy.random.Generator(numpy.random.Philox(key=seed, counter=index)).random() gives: from 0 to below 1.
SAW_HOST_DEVICE inline double philox_uniform(uint64_t seed, uint64_t index) {
    constexpr uint64_t kMultiply0 = 0xD2E7470EE14C6C93, kMultiply1 = 0xCA5A826395121157;
    constexpr uint64_t kWeyl0 = 0x9E3779B97F4A7C15, kWeyl1 = 0xBB67AE8584CAA73B;
    // numpy counts on before it draws.
    uint64_t c0 = index + 1, c1 = c0 == 0, c2 = 0, c3 = 0, key0 = seed, key1 = 0;
    for (int round = 0; round < 10; ++round) {
        uint64_t const high0 = multiply_high(kMultiply0, c0), low0 = kMultiply0 * c0;
        uint64_t const high1 = multiply_high(kMultiply1, c2), low1 = kMultiply1 * c2;
        c0 = high1 ^ c1 ^ key0;
        c1 = low1;
        c2 = high0 ^ c3 ^ key1;
        c3 = low0;
        key0 += kWeyl0;
        key1 += kWeyl1;
    }
    return double(c0 >> 11) * 0x1p-53;
}

#undef SAW_HOST_DEVICE

}  // namespace saw
