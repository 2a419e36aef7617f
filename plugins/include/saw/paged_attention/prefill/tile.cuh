// Prefill: what the version for Hopper and the one for GPUs before it share: which queries a CTA takes and which keys
// these see, and a thread's rows of queries, as the accumulators of the tensor cores hold them.
#pragma once

#include <type_traits>

#include "saw/common/ptx.cuh"
#include "saw/common/vec.cuh"
#include "saw/paged_attention/params.h"

namespace saw {

// Tiles of keys of one kind, of which [first, last] are visible.
struct KeyTiles {
    int first, last;

    __device__ int count() const { return last - first + 1; }
};

// The first position that a query at `position` sees.
__device__ inline int lowest_seen(int position, int window) { return window > 0 ? max(position - window + 1, 0) : 0; }

// Queries that a CTA works on at a time, and the keys that they see.
struct PrefillTile {
    int sequence;     // -1: no more tiles
    int first_token;  // of the sequence's chunk, in the packed step
    int chunk;        // tokens of it
    int history;      // tokens before it
    int begin, end;   // the queries, in the chunk
    KeyTiles own, past;

    // The first position that some query sees. What lies before it in the pool may be another sequence's.
    __device__ int lowest(int window) const { return lowest_seen(history + begin, window); }

    // Whether some query does not see some of the keys [first, end), of the chunk or of the history.
    __device__ bool hides(int first_key, int end_key, bool of_chunk, int window) const {
        bool const tail = of_chunk ? end_key > begin + 1 : end_key > history;
        int const lowest = lowest_seen(history + end - 1, window) - (of_chunk ? history : 0);
        return tail || first_key < lowest;
    }
};

// The longest tiles of a sequence come first, the KV heads of a tile side by side. Every warp looks for itself.
template <int KeysOfTile>
__device__ inline PrefillTile find_prefill_tile(PrefillParams const& p, int queries, int index) {
    int const lane = threadIdx.x % 32;
    int wanted = index / p.pool.num_kv_heads;
    PrefillTile found;
    for (int base = 0; base < p.num_sequences; base += 32) {
        int const s = base + lane;
        int const end = s < p.num_sequences ? p.last_token_ids[s] : 0;
        int const begin = s > 0 && s < p.num_sequences ? p.last_token_ids[s - 1] : 0;
        int const mine = s < p.num_sequences ? (end - begin + queries - 1) / queries : 0;
        int through = mine;
        for (int d = 1; d < 32; d *= 2) {
            int const other = __shfl_up_sync(~0u, through, d);
            if (lane >= d) through += other;
        }
        unsigned const holds = __ballot_sync(~0u, wanted < through);
        if (holds == 0) {
            wanted -= __shfl_sync(~0u, through, 31);
            continue;
        }
        int const from = __ffs(holds) - 1;
        int const place = __shfl_sync(~0u, through, from) - 1 - wanted;
        found.sequence = base + from;
        found.first_token = __shfl_sync(~0u, begin, from);
        found.chunk = __shfl_sync(~0u, end, from) - found.first_token;
        found.history = max(p.sequence_length[found.sequence] - found.chunk, 0);
        found.begin = place * queries;
        found.end = min(found.begin + queries, found.chunk);
        int const lowest = found.lowest(p.window);
        found.own = {max(lowest - found.history, 0) / KeysOfTile, (found.end - 1) / KeysOfTile};
        found.past.first = lowest / KeysOfTile;
        found.past.last = lowest < found.history ? (found.history - 1) / KeysOfTile : found.past.first - 1;
        return found;
    }
    found.sequence = -1;
    return found;
}

// Lane t of each four gets the t-th value of each, in the order of the lanes.
__device__ inline void transpose_4x4(uint32_t (&x)[4], int t) {
#pragma unroll
    for (int d = 1; d < 4; d *= 2) {
#pragma unroll
        for (int i = 0; i < 4; ++i) {
            if (i & d) continue;
            bool const upper = t & d;
            uint32_t const other = __shfl_xor_sync(~0u, upper ? x[i] : x[i + d], d);
            (upper ? x[i] : x[i + d]) = other;
        }
    }
}

// A thread's part of a warp's 16 rows of queries. With g = lane / 4 and t = lane % 4 it holds of rows g + 8 h, h = 0
// and 1, the columns 8 j + 2 t + i, i = 0 and 1, as value 4 j + 2 h + i: of the scores a column is a key, of the output
// a channel.
struct QueryRows {
    int token[2];  // in the chunk
    float max[2], sum[2];

    // `row` is the thread's first, of the tile's.
    __device__ void begin(PrefillTile const& tile, int row, int group) {
        for (int h = 0; h < 2; ++h) {
            token[h] = min(tile.begin + (row + 8 * h) / group, tile.end - 1);
            max[h] = -kInfinity;
            sum[h] = 0.0f;
        }
    }

    // Keys that a row may not see: those after its token, those that do not exist, those before its window.
    template <int N>
    __device__ void mask(float (&s)[N], PrefillTile const& tile, int first_key, bool of_chunk, int window) const {
        int last[2], lowest[2];
        int const first = first_key + threadIdx.x % 4 * 2;
        for (int h = 0; h < 2; ++h) {
            last[h] = (of_chunk ? token[h] : tile.history - 1) - first;
            lowest[h] = lowest_seen(tile.history + token[h], window) - (of_chunk ? tile.history : 0) - first;
        }
#pragma unroll
        for (int i = 0; i < N; ++i) {
            int const h = i / 2 % 2, key = i / 4 * 8 + i % 2;
            if (key > last[h] || key < lowest[h]) s[i] = -kInfinity;
        }
    }

    // Scores become exp2 of what they lack to the row's maximum; `keep` is what is left of sums against the maximum
    // before.
    template <int N>
    __device__ void soften(float (&s)[N], float score_scale, float (&keep)[2]) {
        float shift[2];
#pragma unroll
        for (int h = 0; h < 2; ++h) {
            // Two chains, of which neither waits for the other.
            float tops[2] = {s[2 * h], s[2 * h + 1]};
#pragma unroll
            for (int i = 4; i < N; ++i)
                if (i / 2 % 2 == h) tops[i % 2] = fmaxf(tops[i % 2], s[i]);
            float top = fmaxf(tops[0], tops[1]);
            top = fmaxf(top, __shfl_xor_sync(~0u, top, 1));
            top = fmaxf(top, __shfl_xor_sync(~0u, top, 2));
            float const before = max[h];
            max[h] = fmaxf(before, top * score_scale);
            // A row that has seen no key yet has no maximum.
            shift[h] = max[h] == -kInfinity ? 0.0f : max[h];
            keep[h] = exp2_fast(before - shift[h]);
            sum[h] *= keep[h];
        }
        float mine[2] = {0.0f, 0.0f};
#pragma unroll
        for (int i = 0; i < N; ++i) {
            s[i] = exp2_fast(fmaf(s[i], score_scale, -shift[i / 2 % 2]));
            mine[i / 2 % 2] += s[i];
        }
        // A row's sum is that of its four lanes, whichever holds which part. Handing it on is what keeps the assembler
        // from putting the exponentials off until they are wanted, after the product that they are to run beside.
        for (int h = 0; h < 2; ++h) sum[h] += __shfl_xor_sync(~0u, mine[h], 1);
    }

    // The output of the thread's rows, of which `row` is the first. Four lanes share a row. They swap pairs of channels
    // until each holds whole chunks of eight.
    template <typename T, int N>
    __device__ void write(float const (&out)[N], PrefillParams const& p, PrefillTile const& tile, int kv_head,
                          int group, int row) const {
        constexpr int kHeadDim = 2 * N, kChunks = kHeadDim / 8;
        int const t = threadIdx.x % 4;
// Unrolled, or `out` would have to lie in memory.
#pragma unroll
        for (int h = 0; h < 2; ++h, row += 8) {
            int const query = tile.begin + row / group, head = kv_head * group + row % group;
            float total = sum[h];
            total += __shfl_xor_sync(~0u, total, 1);
            total += __shfl_xor_sync(~0u, total, 2);
            if (p.sinks != nullptr) total += exp2_fast(p.sinks[head] * kLog2e - max[h]);
            float const scale = 1.0f / total;
            bool const exists = query < tile.end;
            T* const target =
                static_cast<T*>(p.out) + (size_t(tile.first_token + query) * p.num_heads + head) * kHeadDim;
#pragma unroll
            for (int c = 0; c < kChunks; c += 4) {
                uint32_t pairs[4];
                for (int i = 0; i < 4; ++i) {
                    float const* const two = out + 4 * (c + i) + 2 * h;
                    pairs[i] = pack_pair<T>(two[0] * scale, two[1] * scale);
                }
                transpose_4x4(pairs, t);
                if (exists) *reinterpret_cast<uint4*>(target + (c + t) * 8) = {pairs[0], pairs[1], pairs[2], pairs[3]};
            }
        }
    }

  private:
    static constexpr float kInfinity = __builtin_huge_valf();
};

// softcap tanh(score / softcap), in the units of the scores.
template <int N>
__device__ inline void cap_scores(float (&s)[N], float softcap, float score_scale) {
    float const inner = score_scale / (kLog2e * softcap), outer = 1.0f / inner;
#pragma unroll
    for (int i = 0; i < N; ++i) s[i] = outer * tanh_fast(s[i] * inner);
}

}  // namespace saw
