// Decode: the product of Q and K's codes, of 4 bits or of 8, as they lie in shared memory.
//
// An fp16 whose bits are a code n is the subnormal n 2^-24, and one whose bits are 16 n is 16 n 2^-24: a mask makes an
// exact operand of two codes that are 16 bits apart. What 2^-24 and 16 lack is taken out of the scores and of Q.
#pragma once

#include <type_traits>

#include "saw/common/ptx.cuh"
#include "saw/common/vec.cuh"

namespace saw {

// Words of a row of HeadDim codes: thread t of four takes the words t, t + 4, ...
template <int Bits, int HeadDim>
struct KeyCodes {
    static constexpr int kOfWord = 32 / Bits;
    static constexpr int kWords = HeadDim / kOfWord;  // of a row, before its scale and lo
    static constexpr int kRowWords = kWords + 1;
    static constexpr int kSteps = kWords / 4;                      // words of a row that a thread scores
    static constexpr int kOperands = kOfWord / 2;                  // of Q, for a word
    using Channels = std::conditional_t<Bits == 4, uint4, uint2>;  // of Q, for a word

    static_assert(kRowWords % 2 == 1, "an odd row length is what spreads rows over the banks");
    static_assert(kWords % 4 == 0, "four threads share a row");
    static_assert(Bits == 4 || kSteps % 2 == 0, "sums of every other step go side by side");

    // Q as the B operand, in the order that a masked word has the channels: (0, 4), (1, 5) over 16, (2, 6), (3, 7) over
    // 16; of 8 bits (0, 2), (1, 3).
    static __device__ void pack(float const (&q)[kOfWord], uint32_t (&b)[kOperands]) {
        if constexpr (Bits == 4) {
            b[0] = pack_half2(q[0], q[4]);
            b[1] = pack_half2(q[1] * 0.0625f, q[5] * 0.0625f);
            b[2] = pack_half2(q[2], q[6]);
            b[3] = pack_half2(q[3] * 0.0625f, q[7] * 0.0625f);
        } else {
            b[0] = pack_half2(q[0], q[2]);
            b[1] = pack_half2(q[1], q[3]);
        }
    }

    // Codes of K times Q: s[.][0..1] of row 4g, s[.][2..3] of row 4g + 1.
    template <int QueryTiles>
    static __device__ void score(uint32_t const* keys, int g, int t, uint32_t const (&q)[QueryTiles][kSteps][kOperands],
                                 float (&s)[QueryTiles][4]) {
        uint32_t const* row = keys + 4 * g * kRowWords + t;
        float odd[QueryTiles][4] = {};
#pragma unroll
        for (int n = 0; n < QueryTiles; ++n)
#pragma unroll
            for (int i = 0; i < 4; ++i) s[n][i] = 0.0f;
#pragma unroll
        for (int j = 0; j < kSteps; ++j) {
            uint32_t const a = row[4 * j], b = row[4 * j + kRowWords];
            uint32_t const a8 = a >> 8, b8 = b >> 8;
            if constexpr (Bits == 4) {
                constexpr uint32_t kEven = 0x000f000f, kOdd = 0x00f000f0;
#pragma unroll
                for (int n = 0; n < QueryTiles; ++n) {
                    mma_16x8x16(s[n], a & kEven, b & kEven, a & kOdd, b & kOdd, q[n][j][0], q[n][j][1]);
                    mma_16x8x16(odd[n], a8 & kEven, b8 & kEven, a8 & kOdd, b8 & kOdd, q[n][j][2], q[n][j][3]);
                }
            } else {
                constexpr uint32_t kBytes = 0x00ff00ff;
#pragma unroll
                for (int n = 0; n < QueryTiles; ++n)
                    mma_16x8x16(j % 2 ? odd[n] : s[n], a & kBytes, b & kBytes, a8 & kBytes, b8 & kBytes, q[n][j][0],
                                q[n][j][1]);
            }
        }
#pragma unroll
        for (int n = 0; n < QueryTiles; ++n)
#pragma unroll
            for (int i = 0; i < 4; ++i) s[n][i] += odd[n][i];
    }
};

}  // namespace saw
