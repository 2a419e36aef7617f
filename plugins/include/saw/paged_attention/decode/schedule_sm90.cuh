// Decode: who works on what, and the copies that load it.
// A part of pipeline_sm90.cuh, which includes it.
#pragma once

#include "saw/paged_attention/decode/pipeline_sm90.cuh"

namespace saw {

// Cut the work list, and find where this CTA's split begins. Every CTA adds up the tiles of all sequences for itself:
// that costs about a microsecond and saves a launch. False if there is no split for it.
template <typename Config>
__device__ bool DecodeSm90Kernel<Config>::find_work() {
    int const each = (p.num_sequences + Config::kThreads - 1) / Config::kThreads;
    int const first = threadIdx.x * each;
    int const last = min(first + each, p.num_sequences);
    int mine = 0, ignored;
    for (int s = first; s < last; ++s) mine += visible_tiles(p.sequence_length[s], ignored);
    int before = mine;
    for (int d = 1; d < 32; d *= 2) {
        int const other = __shfl_up_sync(~0u, before, d);
        if (lane >= d) before += other;
    }
    if (lane == 31) shared.warp_total[warp] = before;
    __syncthreads();
    int total = 0;
    for (int w = 0; w < Config::kWarps; ++w) {
        if (w == warp) before += total - mine;
        total += shared.warp_total[w];
    }
    int const count = count_splits(total);
    if (split >= count) return false;
    auto const splits = Config::Splits::cut(total, count);
    int const begin = splits.begin(split);
    if (before <= begin && begin < before + mine) {
        DecodeCursor c;
        c.begin = before;
        c.num_tiles = 0;
        int s = first;
        do {
            c.begin += c.num_tiles;
            enter_sequence(c, s++);
        } while (begin >= c.begin + c.num_tiles);
        c.tile = begin - c.begin;
        shared.cursors[0] = shared.ahead = c;
        shared.splits = splits;
    }
    left = splits.begin(split + 1) - begin;
    __syncthreads();
    return true;
}

template <typename Config>
__device__ int DecodeSm90Kernel<Config>::count_splits(int tiles) const {
    int const most = int(gridDim.x) / p.pool.num_kv_heads;
    if constexpr (!Config::kFew) return min(most, tiles);
    // As many splits for each sequence: if they are equally long no split has parts of two. And no more of them than it
    // takes for none to have more tiles: each costs a partial sum.
    int const each = max(most / p.num_sequences, 1), average = (tiles + p.num_sequences - 1) / p.num_sequences;
    int const share = max((average + each - 1) / each, 1);
    return min(min((average + share - 1) / share * p.num_sequences, most), tiles);
}

template <typename Config>
__device__ void DecodeSm90Kernel<Config>::enter_sequence(DecodeCursor& c, int sequence) const {
    c.sequence = sequence;
    c.length = p.sequence_length[sequence];
    c.num_tiles = visible_tiles(c.length, c.first_tile);
}

// It must not be called after the last sequence that has tiles.
template <typename Config>
__device__ void DecodeSm90Kernel<Config>::next_sequence(DecodeCursor& c) const {
    c.begin += c.num_tiles;
    c.tile = 0;
    int sequence = c.sequence;
    do {
        enter_sequence(c, ++sequence);
    } while (c.num_tiles == 0);
}

// Warp 0: the next tile to load is the one at shared.ahead.
template <typename Config>
__device__ void DecodeSm90Kernel<Config>::start_loads() {
    DecodeCursor const& c = shared.ahead;
    next_length = c.length;
    next_position = (c.first_tile + c.tile) * Config::kTileTokens;
    hold_blocks();
}

template <typename Config>
__device__ void DecodeSm90Kernel<Config>::hold_blocks() {
    held_block = p.pool.block_of(next_position);
    int const block = held_block + lane / 2;
    if (block * p.pool.tokens_per_block >= next_length) return;  // what the table says of it may be anything
    int32_t const entry = p.pool.table(shared.ahead.sequence, lane % 2 ? kValue : kKey)[block];
    held_rows = p.pool.rows<Config::kKeyRowBytes, Config::kValueRowBytes>(entry, kv_head);
}

// Warp 0: begin the copies of the next tile, and step past it. A tile is a copy of K and one of V for each of its
// blocks, or for its part of a block that is larger.
template <typename Config>
__device__ void DecodeSm90Kernel<Config>::issue_tile_load(int slot) {
    int const copy_tokens = min(p.pool.tokens_per_block, Config::kTileTokens);
    int const tokens = min(Config::kTileTokens, next_length - next_position);
    auto const copies = [&](int n) { return 2 * p.pool.block_of(n + p.pool.tokens_per_block - 1); };
    // Of the lane's copy.
    int const row_bytes = lane % 2 ? Config::kValueRowBytes : Config::kKeyRowBytes;
    uint32_t const bytes = copy_tokens * row_bytes;
    constexpr int kMeanRowBytes = (Config::kKeyRowBytes + Config::kValueRowBytes) / 2;
    if (lane == 0) {
        int const first = min(tokens, Config::kFirstTokens);
        mbarrier_arrive_expect(&shared.full[slot], copies(first) * (copy_tokens * kMeanRowBytes));
        if (Config::kHalves)
            mbarrier_arrive_expect(&shared.rest[slot], copies(tokens - first) * (copy_tokens * kMeanRowBytes));
    }
    __syncwarp();
    // A tile that begins within a block lies within it.
    int const begin = (held_block + lane / 2) * p.pool.tokens_per_block - next_position;
    int const within = max(-begin, 0), offset = max(begin, 0);
    if (begin + p.pool.tokens_per_block > 0 && offset < tokens) {
        uint8_t* const target = shared.stages[slot] + (lane % 2) * Config::kKeyTileBytes + offset * row_bytes;
        bool const of_rest = Config::kHalves && offset >= Config::kFirstTokens;
        bulk_copy(target, held_rows + within * row_bytes, bytes, &(of_rest ? shared.rest : shared.full)[slot]);
    }
    if (--left == 0) return;
    next_position += Config::kTileTokens;
    if (next_position >= next_length) {
        if (lane == 0) next_sequence(shared.ahead);
        __syncwarp();
        start_loads();
    } else if (p.pool.block_of(next_position + Config::kTileTokens - 1) - held_block > 15) {
        hold_blocks();
    }
}

}  // namespace saw
