// The rows of codes of pool.h, of 4 bits and of 8: from the fp32 channels of a row to its scale, its lo and its codes,
// as saw_trtllm/backends/reference/int4.py computes them; and back to fp16.
#pragma once

#include <cstdint>

#include <cuda_fp16.h>

#include "saw/common/pool.h"

namespace saw {

struct RowScale {
    float lo;       // as rounded to fp16
    float inverse;  // 1 / scale of the scale as rounded to fp16
    float range;    // the largest code times scale
    uint32_t tail;  // the row's last four bytes: scale, lo
};

// a / b for a constant b, correctly rounded (Markstein): the quotient by the reciprocal, and what it is off by.
__device__ inline float divide_by(float a, float b, float reciprocal) {
    float const q = a * reciprocal;
    return fmaf(fmaf(-b, q, a), reciprocal, q);
}

// The row's range, from its extremes. No product is fused with a sum that the reference rounds by itself.
template <int Bits = 4>
__device__ inline RowScale row_scale(float lowest, float highest, float range_factor) {
    constexpr float kHalfMax = 65504.0f, kCodeMax = (1 << Bits) - 1;
    float const mid = __fmul_rn(__fadd_rn(lowest, highest), 0.5f);
    float const half = __fmul_rn(__fmul_rn(range_factor, __fsub_rn(highest, lowest)), 0.5f);
    __half const lo = __float2half_rn(fminf(fmaxf(__fsub_rn(mid, half), -kHalfMax), kHalfMax));
    float const range = fminf(fmaxf(2.0f * half, kCodeMax * kMinScale), kCodeMax * kHalfMax);
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

// The order in which Dequantizer gives a word's eight codes if order does not matter: 0, 4, 1, 5, 2, 6, 3, 7.
enum class CodeOrder { kNatural, kInterleaved };

// Eight fp16 numbers in natural order, put into that order.
__device__ inline uint4 interleave(uint4 const& x) {
    return {__byte_perm(x.x, x.z, 0x5410), __byte_perm(x.x, x.z, 0x7632), __byte_perm(x.y, x.w, 0x5410),
            __byte_perm(x.y, x.w, 0x7632)};
}

// Codes of 4 bits to fp16: code * scale + lo, rounded once.
//
// An fp16 of 1024 or more has its units in the lowest bits, so a masked code needs no conversion, only 1024 taken out,
// and 16 where it stands four bits higher. A mask leaves two codes that are four apart: putting them in order costs as
// much as a fifth of the rest.
class Dequantizer {
  public:
    __device__ explicit Dequantizer(uint32_t tail) {
        auto const both = reinterpret_cast<__half2 const&>(tail);
        scale = __low2half2(both);
        lo = __high2half2(both);
        // An instruction holds one constant. These would be the second, and the compiler would load them each time, if
        // it knew that they are constants: blockIdx.y is 0.
        asm volatile("{.reg .u32 zero; mov.u32 zero, %%ctaid.y; add.u32 %0, zero, 0x64006400;}" : "=r"(magic));
        asm volatile("{.reg .u32 zero; mov.u32 zero, %%ctaid.y; add.u32 %0, zero, 0x2c003c00;}" : "=r"(unit));
    }

    // Words of eight codes. They go side by side: one after the other each would wait for its own results.
    template <CodeOrder Order, int Words>
    __device__ void run(uint32_t const* words, uint4 (&eights)[Words]) const {
        uint32_t pairs[Words][4];
#pragma unroll
        for (int w = 0; w < Words; ++w) {
#pragma unroll
            for (int i = 0; i < 2; ++i) {
                uint32_t const low = masked<0x000f000f>(words[w] >> (8 * i));   // codes 2i and 2i + 4
                uint32_t const high = masked<0x00f000f0>(words[w] >> (8 * i));  // the codes after them, times 16
                if (Order == CodeOrder::kNatural) {
                    pairs[w][i] = scaled(__byte_perm(low, high, 0x5410), unit, -1024.0f, -64.0f);
                    pairs[w][i + 2] = scaled(__byte_perm(low, high, 0x7632), unit, -1024.0f, -64.0f);
                } else {
                    pairs[w][2 * i] = scaled(low, 0x3c003c00, -1024.0f, -1024.0f);
                    pairs[w][2 * i + 1] = scaled(high, 0x2c002c00, -64.0f, -64.0f);
                }
            }
        }
#pragma unroll
        for (int w = 0; w < Words; ++w) {
            asm volatile("" : "+r"(pairs[w][0]), "+r"(pairs[w][1]), "+r"(pairs[w][2]), "+r"(pairs[w][3]));
            eights[w] = {pairs[w][0], pairs[w][1], pairs[w][2], pairs[w][3]};
        }
    }

  private:
    __half2 scale, lo;
    uint32_t magic;  // 1024, 1024
    uint32_t unit;   // 1, 1/16

    template <uint32_t Mask>
    __device__ uint32_t masked(uint32_t word) const {
        uint32_t x;
        asm("lop3.b32 %0, %1, %2, %3, 0xea;" : "=r"(x) : "r"(word), "n"(Mask), "r"(magic));  // word & Mask | magic
        return x;
    }

    __device__ uint32_t scaled(uint32_t pair, uint32_t factor, float bias_low, float bias_high) const {
        __half2 const code = __hfma2(reinterpret_cast<__half2 const&>(pair), reinterpret_cast<__half2 const&>(factor),
                                     __floats2half2_rn(bias_low, bias_high));
        __half2 const y = __hfma2(code, scale, lo);
        return reinterpret_cast<uint32_t const&>(y);
    }
};

// Codes of 8 bits to fp16, in their order: code * scale + lo, rounded once. A byte under the upper byte of 1024 is
// 1024 + code, which one permutation gives of two codes.
class Dequantizer8 {
  public:
    __device__ explicit Dequantizer8(uint32_t tail) {
        auto const both = reinterpret_cast<__half2 const&>(tail);
        scale = __low2half2(both);
        lo = __high2half2(both);
    }

    // Two words of four codes to eight numbers, of several side by side.
    template <int Eights>
    __device__ void run(uint32_t const* words, uint4 (&eights)[Eights]) const {
        uint32_t pairs[Eights][4];
#pragma unroll
        for (int e = 0; e < Eights; ++e)
#pragma unroll
            for (int i = 0; i < 4; ++i) pairs[e][i] = pair(words[2 * e + i / 2], i % 2 ? 0x4342 : 0x4140);
#pragma unroll
        for (int e = 0; e < Eights; ++e) {
            asm volatile("" : "+r"(pairs[e][0]), "+r"(pairs[e][1]), "+r"(pairs[e][2]), "+r"(pairs[e][3]));
            eights[e] = {pairs[e][0], pairs[e][1], pairs[e][2], pairs[e][3]};
        }
    }

  private:
    __half2 scale, lo;

    __device__ uint32_t pair(uint32_t word, uint32_t selector) const {
        uint32_t const shifted = __byte_perm(word, 0x64646464, selector);
        __half2 const code = __hadd2(reinterpret_cast<__half2 const&>(shifted), __float2half2_rn(-1024.0f));
        __half2 const y = __hfma2(code, scale, lo);
        return reinterpret_cast<uint32_t const&>(y);
    }
};

// Channels from y[from] on to a word of codes, at most as many as it holds, the first in the lowest bits.
//
// Adding 1.5 2^23 to a number below 2^22 leaves its nearest integer in the low bits, ties to even, and here that
// addition is the only rounding of (y - lo) / scale but for the reciprocal's: a code can differ from one by true
// division only where the quotient is within the largest code times 2^-24 of a half.
template <int Bits = 4, int N>
__device__ inline uint32_t quantize_word(float const (&y)[N], RowScale const& row, int from = 0) {
    constexpr int kCodes = N < 32 / Bits ? N : 32 / Bits;
    constexpr float kMagic = 0x1.8p23f;
    constexpr uint32_t kMagicBits = 0x4b400000;
    // The sum of kMagicBits 2^(Bits i) over the word, to be taken out at once.
    constexpr uint32_t kBias = kMagicBits * ((Bits == 4 ? 0x11111111u : 0x01010101u) >> (32 - Bits * kCodes));
    uint32_t word = 0u - kBias;
#pragma unroll
    for (int i = 0; i < kCodes; ++i) {
        float const above = fminf(fmaxf(y[from + i] - row.lo, 0.0f), row.range);
        word += __float_as_uint(fmaf(above, row.inverse, kMagic)) << (Bits * i);
    }
    return word;
}

}  // namespace saw
