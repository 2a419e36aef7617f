// Rows of activations in a warp's registers, and the block-diagonal Hadamard rotation of such rows.
//
// kLanes neighbouring lanes hold one row in chunks of 8 channels: x[s][i] of lane l is channel 8 (s kLanes + l) + i. So
// bits 0..2 of a channel's index name a register, the next log2(kLanes) bits a lane, and what is left a slot.
#pragma once

#include <cuda_runtime.h>

#include "saw/common/ptx.cuh"

namespace saw {

// 1 / sqrt(order), as saw_trtllm/format.py rounds it.
__device__ constexpr float hadamard_norm(int order) {
    float norm = order & 0xaaaaaaaa ? 0.70710678118654752f : 1.0f;
    for (; order >= 4; order /= 4) norm *= 0.5f;
    return norm;
}

// The meeting of the channels whose indices differ in bits 2, 3 and 4, by the tensor cores. Those bits are bit 2 of a
// register's name and the two lowest bits of a lane's: k = lane % 4 + 4 (i / 4) of an m16n8k8 product, whose rows are
// those of x, whose B is a Hadamard matrix of order 8 (of 4 beside an identity, if blocks end at bit 3), with its
// columns in the order in which D's registers are those of A.
//
// TF32 has 11 bits of a number: what is left of each is a second product's operand. Together they are 22 bits.
template <int kOrder, int kSlots>
__device__ inline void hadamard_middle(float (&x)[kSlots][8]) {
    constexpr int kInBlock = kOrder >= 32 ? 7 : 5;  // of k's bits; channel bit 4 is bit 1 of k
    int const lane = threadIdx.x % 32;
    float b[2];
#pragma unroll
    for (int i = 0; i < 2; ++i) {
        int const k = lane % 4 + 4 * i, column = lane / 8 + 4 * (lane / 4 % 2);
        bool const same_block = ((k ^ column) & ~kInBlock) == 0;
        b[i] = !same_block ? 0.0f : __popc(k & column & kInBlock) % 2 ? -1.0f : 1.0f;
    }
#pragma unroll
    for (int s = 0; s < kSlots; ++s)
#pragma unroll
        for (int i = 0; i < 4; i += 2) {
            float const a[4] = {x[s][i], x[s][i + 1], x[s][i + 4], x[s][i + 5]};
            float high[4], low[4], d[4] = {};
#pragma unroll
            for (int j = 0; j < 4; ++j) {
                high[j] = __uint_as_float(__float_as_uint(a[j]) & 0xffffe000u);
                low[j] = a[j] - high[j];
            }
            mma_16x8x8(d, low, b);
            mma_16x8x8(d, high, b);
            x[s][i] = d[0];
            x[s][i + 4] = d[1];
            x[s][i + 1] = d[2];
            x[s][i + 5] = d[3];
        }
}

// x becomes x B, B block-diagonal with blocks H / sqrt(order), H Sylvester's. Channels meet bit by bit of their index:
// a bit of a register's costs only additions, a bit of the lane's one shuffle per register more, or three bits
// together the tensor cores and two operations per register. The latter is for many rows: shuffles have the shorter
// way.
template <int kOrder, int kLanes, bool kTensorCores, int kSlots>
__device__ inline void hadamard(float (&x)[kSlots][8]) {
    static_assert(kOrder >= 16 && (kOrder & (kOrder - 1)) == 0 && 8 * kLanes * kSlots % kOrder == 0 && kLanes >= 4,
                  "blocks fill the row");
#pragma unroll
    for (int bit = 1; bit < (kTensorCores ? 4 : 8); bit *= 2)
#pragma unroll
        for (int s = 0; s < kSlots; ++s)
#pragma unroll
            for (int i = 0; i < 8; ++i) {
                if (i & bit) continue;
                // The norm costs one product for two channels in a fused first step.
                float const scale = bit == 1 ? hadamard_norm(kOrder) : 1.0f;
                float const a = scale * x[s][i], b = x[s][i | bit];
                x[s][i] = fmaf(scale, b, a);
                x[s][i | bit] = fmaf(-scale, b, a);
            }
    if constexpr (kTensorCores) hadamard_middle<kOrder>(x);
#pragma unroll
    for (int mask = kTensorCores ? 4 : 1; mask < kLanes; mask *= 2) {
        if (kOrder <= 8 * mask) continue;
        float const sign = threadIdx.x & mask ? -1.0f : 1.0f;
#pragma unroll
        for (int s = 0; s < kSlots; ++s)
#pragma unroll
            for (int i = 0; i < 8; ++i) x[s][i] = fmaf(sign, x[s][i], __shfl_xor_sync(~0u, x[s][i], mask));
    }
#pragma unroll
    for (int bit = 1; bit < kSlots; bit *= 2) {
        if (kOrder <= 8 * kLanes * bit) continue;
#pragma unroll
        for (int s = 0; s < kSlots; ++s)
#pragma unroll
            for (int i = 0; i < 8; ++i) {
                if (s & bit) continue;
                float const a = x[s][i], b = x[s | bit][i];
                x[s][i] = a + b;
                x[s | bit][i] = a - b;
            }
    }
}

}  // namespace saw
