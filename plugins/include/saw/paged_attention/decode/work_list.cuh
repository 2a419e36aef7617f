// Decode: what its kernels share. All sequences' tokens, cut into tiles, form one work list, and the work list is cut
// into splits.
#pragma once

#include "saw/common/ptx.cuh"
#include "saw/paged_attention/params.h"

namespace saw {

// What a masked fp16 operand of codes lacks to the code.
constexpr float kCodeUnit = 0x1p24f;

// A place on the work list of tiles.
struct DecodeCursor {
    int sequence;
    int length;      // of the sequence
    int first_tile;  // of the sequence that its query sees
    int num_tiles;   // of the sequence
    int tile;        // counted from first_tile
    int begin;       // the work list's index of the sequence's first tile
};

// The splits of the work list: `share` tiles each, and one more for the first `larger`.
struct DecodeSplits {
    int count;
    int share, larger;

    static __device__ DecodeSplits cut(int tiles, int count) { return {count, tiles / count, tiles % count}; }

    __device__ int begin(int split) const { return split * share + min(split, larger); }

    __device__ int of(int tile) const {
        int const in_larger = larger * (share + 1);
        return tile < in_larger ? tile / (share + 1) : larger + (tile - in_larger) / share;
    }
};

// The same, as even as it goes all along the work list: sequences of one length that get several splits each get whole
// ones.
struct EvenDecodeSplits {
    int count;
    int tiles;

    static __device__ EvenDecodeSplits cut(int tiles, int count) { return {count, tiles}; }

    __device__ int begin(int split) const { return split * tiles / count; }

    __device__ int of(int tile) const { return ((tile + 1) * count - 1) / tiles; }
};

// A partial sum in the workspace: output [queries, head_dim], then per query the maximum and the sum of the softmax.
__host__ __device__ constexpr size_t decode_partial_floats(int group, int head_dim) {
    return (size_t(group) * (head_dim + 2) + 3) & ~size_t(3);  // read 16 bytes at a time
}

// Four elements of partial sums, added up.
struct DecodeSum {
    float4 out = {0.0f, 0.0f, 0.0f, 0.0f};
    float max = -1e30f, sum = 0.0f;  // of the softmax

    // Take sums against a maximum that is at least as high.
    __device__ void raise(float higher) {
        float const keep = exp2_fast(max - higher);
        max = higher;
        sum *= keep;
        out = {out.x * keep, out.y * keep, out.z * keep, out.w * keep};
    }

    __device__ void add(float4 const& other, float other_max, float other_sum) {
        float const weight = exp2_fast(other_max - max);
        sum += other_sum * weight;
        out.x += other.x * weight;
        out.y += other.y * weight;
        out.z += other.z * weight;
        out.w += other.w * weight;
    }
};

// The workspace: two partial sums for each CTA, and after them a counter for each sequence and KV head.
constexpr size_t decode_partials_bytes(int ctas, int group, int head_dim) {
    return 2 * ctas * decode_partial_floats(group, head_dim) * sizeof(float);
}

}  // namespace saw
