// The 4-bit row of layout.h: from the fp32 channels of a row to its scale, its lo and its codes, as
// saw_trtllm/reference/int4.py computes them.
#pragma once

#include <cstdint>

#include <cuda_fp16.h>

#include "saw/layout.h"

namespace saw {

struct RowScale {
    float lo;       // as rounded to fp16
    float inverse;  // 1 / scale of the scale as rounded to fp16
    float range;    // 15 scale
    uint32_t tail;  // the row's last four bytes: scale, lo
};

// a / b for a constant b, correctly rounded (Markstein): the quotient by the reciprocal, and what it is off by.
__device__ inline float divide_by(float a, float b, float reciprocal) {
    float const q = a * reciprocal;
    return fmaf(fmaf(-b, q, a), reciprocal, q);
}

// The row's range, from its extremes. No product is fused with a sum that the reference rounds by itself.
__device__ inline RowScale row_scale(float lowest, float highest, float range_factor) {
    constexpr float kHalfMax = 65504.0f;
    float const mid = __fmul_rn(__fadd_rn(lowest, highest), 0.5f);
    float const half = __fmul_rn(__fmul_rn(range_factor, __fsub_rn(highest, lowest)), 0.5f);
    __half const lo = __float2half_rn(fminf(fmaxf(__fsub_rn(mid, half), -kHalfMax), kHalfMax));
    float const range = fminf(fmaxf(2.0f * half, kRangeEps), kCodeMax * kHalfMax);
    __half const scale = __float2half_rn(divide_by(range, kCodeMax, 1.0f / kCodeMax));

    RowScale row;
    row.lo = __half2float(lo);
    float const s = __half2float(scale);
    float inverse;
    asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(inverse) : "f"(s));
    // One Newton step rounds the reciprocal of an 11-bit number correctly.
    row.inverse = fmaf(inverse, fmaf(-s, inverse, 1.0f), inverse);
    row.range = kCodeMax * s;
    row.tail = uint32_t(__half_as_ushort(lo)) << 16 | __half_as_ushort(scale);
    return row;
}

// Eight channels to a word of codes, the first in the lowest nibble.
//
// Adding 1.5 2^23 to a number below 2^22 leaves its nearest integer in the low bits, ties to even, and here that
// addition is the only rounding of (y - lo) / scale but for the reciprocal's: a code can differ from one by true
// division only where the quotient is within 15 2^-24 of a half.
__device__ inline uint32_t quantize_word(float const (&y)[8], RowScale const& row) {
    constexpr float kMagic = 0x1.8p23f;
    constexpr uint32_t kMagicBits = 0x4b400000;
    // The sum of kMagicBits 16^i over the word, to be taken out at once.
    constexpr uint32_t kBias = kMagicBits * 0x11111111u;
    uint32_t word = 0u - kBias;
#pragma unroll
    for (int i = 0; i < 8; ++i) {
        float const above = fminf(fmaxf(y[i] - row.lo, 0.0f), row.range);
        word += __float_as_uint(fmaf(above, row.inverse, kMagic)) << (4 * i);
    }
    return word;
}

}  // namespace saw
