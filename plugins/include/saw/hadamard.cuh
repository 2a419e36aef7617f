// Rows of activations in a warp's registers, and the block-diagonal Hadamard rotation of such rows.
//
// kLanes neighbouring lanes hold one row in chunks of 8 channels: x[s][i] of lane l is channel 8 (s kLanes + l) + i. So
// bits 0..2 of a channel's index name a register, the next log2(kLanes) bits a lane, and what is left a slot.
#pragma once

#include <cuda_runtime.h>

namespace saw {

// 1 / sqrt(order), as saw_trtllm/format.py rounds it.
__device__ constexpr float hadamard_norm(int order) {
    float norm = order & 0xaaaaaaaa ? 0.70710678118654752f : 1.0f;
    for (; order >= 4; order /= 4) norm *= 0.5f;
    return norm;
}

// x becomes x B, B block-diagonal with blocks H / sqrt(order), H Sylvester's. Channels meet bit by bit of their index:
// three bits cost additions alone, a bit of the lane's one shuffle per register more.
template <int kOrder, int kLanes, int kSlots>
__device__ inline void hadamard(float (&x)[kSlots][8]) {
    static_assert(kOrder >= 8 && (kOrder & (kOrder - 1)) == 0 && 8 * kLanes * kSlots % kOrder == 0,
                  "blocks fill the row");
#pragma unroll
    for (int bit = 1; bit < 8; bit *= 2)
#pragma unroll
        for (int s = 0; s < kSlots; ++s)
#pragma unroll
            for (int i = 0; i < 8; ++i) {
                if (i & bit) continue;
                // The norm costs one product for two channels in a fused first step.
                float const scale = bit == 1 ? hadamard_norm(kOrder) : 1.0f;
                float const a = x[s][i], b = scale * x[s][i | bit];
                x[s][i] = fmaf(scale, a, b);
                x[s][i | bit] = fmaf(scale, a, -b);
            }
#pragma unroll
    for (int mask = 1; mask < kLanes; mask *= 2) {
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
