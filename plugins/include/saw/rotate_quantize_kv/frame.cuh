// The write with calibrated frames: Q and K of a token times a matrix of their KV head, in the Hadamard blocks' place.
//
// A CTA works on a run of tiles of rows, all of Q, of K or of V and of one KV head. V is multiplied too, by the
// Hadamard matrix, if it is to be rotated. frame_few.cuh is for few tokens, where the time is that of a chain of loads,
// and frame_many_sm90.cuh for many; here is what they share.
//
// What is multiplied is split into two numbers of fp16, high + low / 2^11, which are 22 bits together:
//     x M = high(x) high(M) + (high(x) low(M) + low(x) high(M)) / 2^11
// The product that is left out and what the parts leave of each number are at most 3 2^-22 |x| |M| of each term, and
// the fp32 sums of the tensor cores lose 2^-23 of a partial sum in each step: next to what fp32 would lose. So it is
// for K, whose codes are to be the reference's, and for Q of fp16, whose output has as many bits as a part. Q of bf16
// is rounded by 2^-8 in the end; high(x) high(M) is off by at most 2^-10 of each term, and since that is random,
// by a sixth of that rounding on average.
//
// A frame in memory is fp16 [2 (high, low), head_dim / 16 (blocks of columns), head_dim / 16 (steps), 32 (lanes), 8]:
// what a lane takes for two products m16n8k16 side by side. With g = lane / 4 and t = lane % 4, of the eight numbers
// number 4 j + 2 h + i is row 16 step + 8 h + 2 t + i and column 16 block + 4 (g / 2) + 2 j + g % 2 of the matrix.
// Columns are in this order so that a lane's four sums of a row are neighbors.
#pragma once

#include <type_traits>

#include "saw/common/hadamard.cuh"
#include "saw/common/int4.cuh"
#include "saw/common/ptx.cuh"
#include "saw/rotate_quantize_kv/kernel.cuh"
#include "saw/rotate_quantize_kv/params.h"

namespace saw {

struct FrameGrid {
    int group;         // query heads of a KV head
    int rows_per_run;  // gridDim is (2 + group: runs of a KV head over the same tokens, num_kv_heads, runs of K)
};

constexpr float kLowFactor = 2048.0f;  // of low parts

// Saturating: what is beyond fp16 has no place in the cache either.
__device__ inline uint32_t pack_half2_saturated(float low, float high) {
    uint32_t pair;
    asm("cvt.rn.satfinite.f16x2.f32 %0, %1, %2;" : "=r"(pair) : "f"(high), "f"(low));
    return pair;
}

__device__ inline uint32_t high_pair(float a, float b) { return pack_half2_saturated(a, b); }

__device__ inline uint32_t low_pair(float a, float b, uint32_t high) {
    float2 const taken = __half22float2(reinterpret_cast<__half2 const&>(high));
    return pack_half2_saturated((a - taken.x) * kLowFactor, (b - taken.y) * kLowFactor);
}

// Rows of a run: what is read and written for them, and what they are multiplied by. K's codes have KeyBits.
template <int HeadDim, typename T, RowKind Kind, int KeyBits>
class FrameRows {
  protected:
    static constexpr int kBits = Kind == kKeyRows ? KeyBits : 4;
    static constexpr int kWordsOfChunk = kBits / 4;                 // of codes, for a chunk
    static constexpr int kCodeWords = HeadDim / 8 * kWordsOfChunk;  // of a row in the pool
    static constexpr int kRowWords = kCodeWords + 1;
    static constexpr int kSteps = HeadDim / 16;
    static constexpr int kChunks = HeadDim / 8;  // of a row
    static constexpr bool kSplitX = Kind != kQueryRows || std::is_same_v<T, __half>;
    static constexpr bool kSplitMatrix = Kind != kValueRows && kSplitX;

    struct Row {
        int token;
        int head;  // of Q, of K or of V; -1: there is no such row
    };
    // Where in the pool a token goes; slot -1 is nowhere.
    struct Place {
        int32_t entry;  // of the block table
        int slot;
    };

    RotateQuantizeKvParams const& p;
    int const group;
    int const head;  // KV head
    int const begin, end;

    __device__ FrameRows(RotateQuantizeKvParams const& params, FrameGrid const& grid)
        : p(params),
          group(grid.group),
          head(blockIdx.y),
          begin((Kind == kQueryRows ? blockIdx.z * group + blockIdx.x - 2 : blockIdx.z) * grid.rows_per_run),
          end(min(Kind == kQueryRows ? p.num_tokens * group : p.num_tokens, begin + grid.rows_per_run)) {}

    __device__ int order() const { return Kind == kValueRows && p.rotate_v ? p.hadamard_order : 1; }  // of V's matrix
    __device__ bool stays() const { return Kind == kValueRows && !p.rotate_v; }
    __device__ void* out() const { return Kind == kQueryRows ? p.q_out : Kind == kKeyRows ? p.k_out : p.v_out; }

    // Of a chunk in shared memory: eight rows of one chunk, which ldmatrix reads at once, lie in eight different groups
    // of banks.
    __device__ static int place(int row, int chunk) {
        return row * kChunks + (chunk ^ (kChunks % 8 == 0 ? row % 8 : row / 2 % 4));
    }

    __device__ Row row_at(int r) const {
        if (r >= end) return {0, -1};
        if (Kind != kQueryRows) return {r, head};
        int const token = unsigned(r) / unsigned(group);
        return {token, head * group + r - token * group};
    }

    // Chunks of a row of qkv, of the first head's where there is no such row; and of a row that is written.
    __device__ uint4 const* source(Row const& row) const {
        int const heads = p.num_heads + 2 * p.pool.num_kv_heads;
        int const before = Kind == kQueryRows ? 0 : p.num_heads + (Kind == kValueRows ? p.pool.num_kv_heads : 0);
        int64_t const first = int64_t(row.token) * heads + before + max(row.head, 0);
        return static_cast<uint4 const*>(p.qkv) + first * kChunks;
    }
    __device__ uint4* target(Row const& row) const {
        int const heads = Kind == kQueryRows ? p.num_heads : p.pool.num_kv_heads;
        return static_cast<uint4*>(out()) + (int64_t(row.token) * heads + row.head) * kChunks;
    }

    __device__ int position(Row const& row) const { return Kind == kValueRows ? 0 : __ldg(p.position_ids + row.token); }
    __device__ float4 const* angles(int position) const {
        return reinterpret_cast<float4 const*>(p.cos_sin) + int64_t(position) * (HeadDim / 4);
    }

    __device__ Place find_place(int token, int sequence) const {
        if (sequence >= p.num_sequences || token >= end) return {0, -1};
        int const slot = __ldg(p.sequence_length + sequence) - (__ldg(p.last_token_ids + sequence) - token);
        if (Kind == kKeyRows && p.decode_counters != nullptr)
            p.decode_counters[sequence * p.pool.num_kv_heads + head] = 0;
        int32_t const* const table = p.pool.table(sequence, Kind == kKeyRows ? kKey : kValue);
        return {__ldg(table + p.pool.block_of(slot)), slot};
    }
    __device__ uint8_t* pool_row(Place place) const {
        if (place.slot < 0) return nullptr;
        if constexpr (KeyBits == 4) {
            return p.pool.rows(place.entry, head) + p.pool.row_of(place.slot) * p.pool.row_bytes;
        } else {
            return p.pool.rows<int8_row_bytes(HeadDim), int4_row_bytes(HeadDim)>(place.entry, head) +
                   p.pool.row_of(place.slot) * (4 * kRowWords);
        }
    }

    // Codes of 8 bits span the whole range.
    __device__ RowScale scale_of(float lowest, float highest) const {
        return row_scale<kBits>(lowest, highest, kBits == 4 ? p.range_factor : 1.0f);
    }

    __device__ uint4 matrix(int part, int block, int step, int lane) const;
};

// What a lane takes of the matrix for a block of columns and a step.
template <int HeadDim, typename T, RowKind Kind, int KeyBits>
__device__ uint4 FrameRows<HeadDim, T, Kind, KeyBits>::matrix(int part, int block, int step, int lane) const {
    if constexpr (Kind != kValueRows) {
        auto const* const frame = static_cast<uint4 const*>(Kind == kQueryRows ? p.q_frame : p.k_frame);
        return __ldg(frame + (((head * 2 + part) * kSteps + block) * kSteps + step) * 32 + lane);
    }
    // Signs of the Hadamard matrix, whose norm comes in the end; of order 1 it is the identity. The rows' upper bits
    // are the step, the columns' are the block.
    if ((step ^ block) * 16 >= order()) return {0, 0, 0, 0};
    uint32_t words[4];
#pragma unroll
    for (int i = 0; i < 4; ++i) {
        uint32_t bits[2];
#pragma unroll
        for (int j = 0; j < 2; ++j) {
            int const k = 8 * (i % 2) + 2 * (lane % 4) + j, n = 4 * (lane / 8) + 2 * (i / 2) + lane / 4 % 2;
            int const signs = __popc(k & n) + __popc(step & block & (order() / 16 - 1));
            bits[j] = order() == 1 && k != n ? 0 : order() > 1 && signs % 2 ? 0xbc00 : 0x3c00;
        }
        words[i] = bits[1] << 16 | bits[0];
    }
    return {words[0], words[1], words[2], words[3]};
}

}  // namespace saw
