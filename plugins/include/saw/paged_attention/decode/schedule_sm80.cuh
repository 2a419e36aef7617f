// Decode: who works on what, and the copies that load it.
// A part of pipeline_sm80.cuh, which includes it.
#pragma once

#include "saw/paged_attention/decode/pipeline_sm80.cuh"

namespace saw {

// Cut the work list, and find where this CTA's split begins. Every warp adds up the tiles of all sequences for itself:
// that costs less than a microsecond and saves a launch. False if there is no split for this CTA.
template <typename Config>
__device__ bool DecodeSm80Kernel<Config>::find_work() {
    int ignored, total = 0;
    for (int s = lane; s < p.num_sequences; s += 32) total += visible_tiles(p.sequence_length[s], ignored);
    total = __reduce_add_sync(~0u, total);
    int const count = min(int(gridDim.z), (total + min_share - 1) / min_share);
    if (split >= count) return false;
    DecodeSplits const splits{count, total / count, total % count};
    int const begin = splits.begin(split);
    int first = 0, before = 0, tiles;
    while (true) {
        DecodeCursor c;
        c.sequence = first + lane;
        c.length = c.sequence < p.num_sequences ? p.sequence_length[c.sequence] : 0;
        c.num_tiles = visible_tiles(c.length, c.first_tile);
        tiles = __reduce_add_sync(~0u, c.num_tiles);
        if (begin >= before + tiles) {
            before += tiles;
            first += 32;
            continue;
        }
        c.begin = before;
        for (int d = 1, up = c.num_tiles; d < 32; d *= 2) {
            int const other = __shfl_up_sync(~0u, up, d);
            if (lane >= d) up += other;
            if (d == 16) c.begin += up - c.num_tiles;
        }
        c.tile = begin - c.begin;
        if (c.tile >= 0 && c.tile < c.num_tiles) {
            mine().splits = splits;
            mine().now = mine().ahead = c;
        }
        break;
    }
    int const size = splits.begin(split + 1) - begin;
    left = warp < size ? (size - warp + Config::kWarps - 1) / Config::kWarps : 0;
    __syncwarp();
    return true;
}

// It must not be called to go past the last sequence that has tiles.
template <typename Config>
__device__ void DecodeSm80Kernel<Config>::advance(DecodeCursor& c, int tiles) const {
    c.tile += tiles;
    while (c.tile >= c.num_tiles) {
        c.tile -= c.num_tiles;
        c.begin += c.num_tiles;
        c.length = p.sequence_length[++c.sequence];
        c.num_tiles = visible_tiles(c.length, c.first_tile);
    }
}

template <typename Config>
__device__ void DecodeSm80Kernel<Config>::start_loads() {
    if (left == 0) return;
    if (lane == 0) advance(mine().ahead, warp);
    __syncwarp();
    hold_parts();
}

// Lanes 2i and 2i + 1 look up the i-th part from mine().ahead on, K's and V's.
template <typename Config>
__device__ void DecodeSm80Kernel<Config>::hold_parts() {
    DecodeCursor const& c = mine().ahead;
    next_length = c.length;
    next_seen = seen_from(c.length);
    next_position = (c.first_tile + c.tile) * Config::kTileTokens;
    held_at = 0;
    held = nullptr;
    int const offset = lane / 2 * part_tokens();
    int const tile = offset / Config::kTileTokens * Config::kWarps;
    int const token = next_position + tile * Config::kTileTokens + offset % Config::kTileTokens;
    // What the table says of other blocks may be anything.
    if (token < next_length && token + part_tokens() > next_seen) {
        int32_t const entry = p.pool.table(c.sequence, lane % 2 ? kValue : kKey)[p.pool.block_of(token)];
        held = p.pool.rows<Rows::kKeyRowBytes, Rows::kValueRowBytes>(entry, kv_head) +
               p.pool.row_of(token) * (lane % 2 ? Rows::kValueRowBytes : Rows::kKeyRowBytes);
    }
}

// Begin to load the next tile, if one is left, and step past it.
template <typename Config>
__device__ void DecodeSm80Kernel<Config>::issue_tile_load(int slot) {
    __syncwarp();  // all lanes have left the slot
    if (left > 0) {
        issue_copies(slot);
        held_at += parts_per_tile();
        next_position += Config::kWarps * Config::kTileTokens;
        if (--left > 0 && (held_at == 32 || next_position >= next_length)) {
            int const tiles = held_at * part_tokens() / (2 * Config::kTileTokens);
            if (lane == 0) advance(mine().ahead, tiles * Config::kWarps);
            __syncwarp();
            hold_parts();
        }
    }
    end_copy_group();  // an empty one too: waiting counts them
}

template <typename Config>
__device__ void DecodeSm80Kernel<Config>::issue_copies(int slot) {
    uint8_t* const stage = shared.stages[warp][slot];
    constexpr bool kOneSize = Rows::kKeyRowBytes == Rows::kValueRowBytes;
    int const key_bytes = part_tokens() * Rows::kKeyRowBytes, value_bytes = part_tokens() * Rows::kValueRowBytes;
    for (int at = 0, from = held_at; at < Config::kTileTokens; at += part_tokens())
        for (int kv = 0; kv < 2; ++kv, ++from) {
            auto const source =
                reinterpret_cast<uint8_t const*>(__shfl_sync(~0u, reinterpret_cast<unsigned long long>(held), from));
            int const row_bytes = kOneSize || kv == kKey ? Rows::kKeyRowBytes : Rows::kValueRowBytes;
            int const bytes = kOneSize || kv == kKey ? key_bytes : value_bytes;
            uint8_t* const target = stage + kv * Config::kKeyTileBytes + at * row_bytes;
#pragma unroll 4
            for (int chunk = lane; chunk < bytes / 16; chunk += 32) {
                bool seen = source != nullptr;
                if constexpr (Rows::kNeedsZeros) {
                    int const token = next_position + at + chunk * 16 / row_bytes;
                    seen = seen && token >= next_seen && token < next_length;
                }
                if (seen || Rows::kNeedsZeros)
                    copy_async(shared_address(target + Rows::place(chunk) * 16),
                               source ? source + chunk * 16 : p.pool.base, seen ? 16 : 0);
            }
        }
}

}  // namespace saw
