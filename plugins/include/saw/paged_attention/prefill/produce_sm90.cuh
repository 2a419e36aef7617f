// Prefill: the producer warps.
// A part of pipeline_sm90.cuh, which includes it.
#pragma once

#include "saw/paged_attention/prefill/pipeline_sm90.cuh"

namespace saw {

template <typename Config>
__device__ void PrefillSm90Kernel<Config>::produce() {
    int const warp = threadIdx.x / 32;
    for (int index = blockIdx.x; tile.sequence >= 0;) {
        produce_rows(tile.own, true, warp);
        if constexpr (Config::kCodes) {
            produce_dequantized(warp);
        } else {
            produce_rows(tile.past, false, warp);
        }
        index += gridDim.x;
        tile = find_tile(index);
        kv_head = index % p.pool.num_kv_heads;
    }
}

// 16-bit tiles: whole ones by the copy engine, and row by row what ends within a tile, or V's that a window begins in.
template <typename Config>
__device__ void PrefillSm90Kernel<Config>::produce_rows(KeyTiles tiles, bool chunk, int warp) {
    int const steps = 2 * tiles.count();
    int const end = chunk ? tile.chunk : tile.history, lowest = chunk ? 0 : tile.lowest(p.window);
    for (int step = 0; step < steps; ++step) {
        int which;
        int const start = tile_of(tiles, step, which) * Config::kTileTokens;
        uint64_t* const full = &shared.full[ring.slot];
        wait_for_slot();
        if (end - start < Config::kTileTokens || (which == kValue && start < lowest)) {
            copy_rows(shared.slots[ring.slot], which, start, lowest - start, end - start, chunk, warp);
            copy_async_wait();
            fence_bulk_copy();
            __syncwarp();
        } else if (warp == 0) {
            if (lane == 0) mbarrier_expect(full, Config::kTileBytes);
            __syncwarp();
            copy_boxes(shared.slots[ring.slot], which, start, chunk, full);
        }
        // All four warps count for each tile: that keeps them together.
        if (lane == 0) mbarrier_arrive(full);
        ring.template advance<Config>();
    }
}

template <typename Config>
__device__ void PrefillSm90Kernel<Config>::copy_boxes(uint8_t* slot, int which, int start, bool chunk, uint64_t* full) {
    if (chunk) {
        CUtensorMap const& map = which == kKey ? maps.k : maps.v;
        for (int box = lane; box < Config::kBoxes; box += 32)
            copy_box(slot + box * Config::kTileBoxBytes, map, full, kv_head * Config::kHeadDim + box * 64,
                     tile.first_token + start);
        return;
    }
    int const rows = min(p.pool.tokens_per_block, Config::kTileTokens);
    if (lane * rows >= Config::kTileTokens) return;
    int32_t const entry = p.pool.table(tile.sequence, KV(which))[p.pool.block_of(start) + lane];
    size_t const byte = p.pool.rows(entry, kv_head) - p.pool.base;
    int const row = int(byte / Config::kValueRowBytes) + p.pool.row_of(start);
    for (int box = 0; box < Config::kBoxes; ++box)
        copy_box(slot + box * Config::kTileBoxBytes + lane * rows * 128, maps.pool, full, box * 64, row);
}

// A warp's quarter of a tile. Rows that do not exist, and those before a window, become zeros: what lies there may be
// anything, and 0 * NaN is NaN.
template <typename Config>
__device__ void PrefillSm90Kernel<Config>::copy_rows(uint8_t* slot, int which, int start, int first, int valid,
                                                     bool chunk, int warp) {
    constexpr int kChunks = Config::kHeadDim / 8;  // of 16 bytes, in a row
    constexpr int kSteps = Config::kTileTokens * kChunks / 128;
    uint32_t const target = shared_address(slot);
    // A chunk's rows follow each other at a fixed distance; a pool's in blocks, of which lane i knows the i-th.
    uint8_t const* rows;
    size_t stride;
    int first_block = 0;
    if (chunk) {
        auto const* const packed = static_cast<T const*>(which == kKey ? p.k : p.v);
        stride = size_t(p.pool.num_kv_heads) * Config::kHeadDim * sizeof(T);
        rows =
            reinterpret_cast<uint8_t const*>(packed + kv_head * Config::kHeadDim) + (tile.first_token + start) * stride;
    } else {
        stride = Config::kHeadDim * sizeof(T);
        first_block = p.pool.block_of(start);
        int const block = first_block + lane;
        rows = p.pool.base;
        if (block <= p.pool.block_of(start + valid - 1))
            rows = p.pool.rows(p.pool.table(tile.sequence, KV(which))[block], kv_head);
    }
#pragma unroll 4
    for (int i = 0; i < kSteps; ++i) {
        int const at = (warp * kSteps + i) * 32 + lane;
        int const row = at / kChunks, c = at % kChunks;
        uint8_t const* source = rows;
        int within = row;
        if (!chunk) {
            within = p.pool.row_of(start + row);
            int const holder = p.pool.block_of(start + row) - first_block;
            source =
                reinterpret_cast<uint8_t const*>(__shfl_sync(~0u, reinterpret_cast<unsigned long long>(rows), holder));
        }
        bool const exists = row < valid && row >= first;
        source += exists ? within * stride + c * 16 : 0;
        copy_async(target + (c / 8) * Config::kTileBoxBytes + row * 128 + ((c ^ row) % 8) * 16, source,
                   exists ? 16 : 0);
    }
}

// Tiles of codes: bulk copies stage them as they are, and the four warps together make fp16 of one after the other.
template <typename Config>
__device__ void PrefillSm90Kernel<Config>::produce_dequantized(int warp) {
    int const steps = 2 * tile.past.count(), lowest = tile.lowest(p.window);
    if (warp == 0) {
        for (int step = 0; step < min(Config::kStaged, steps); ++step) stage(step, block_offset(step));
    }
    for (int step = 0; step < steps; ++step) {
        int which;
        int const start = tile_of(tile.past, step, which) * Config::kTileTokens;
        int const place = (staged + step) % Config::kStaged;
        // The tile that takes the place of the one before; its block table entry is asked for in time.
        int const next = step - 1 + Config::kStaged;
        bool const stages = warp == step % 4 && step > 0 && next < steps;
        int offset = 0;
        if (stages) offset = block_offset(next);
        mbarrier_wait(&shared.arrived[place], (staged + step) / Config::kStaged % 2);
        if (which == kKey) {
            dequantize<Config::kKeyBits, Config::kKeyOrder>(shared.staged[place], &shared.left[place], lowest - start,
                                                            tile.history - start);
        } else {
            dequantize<4, Config::kValueOrder>(shared.staged[place], &shared.left[place], lowest - start,
                                               tile.history - start);
        }
        fence_bulk_copy();
        __syncwarp();
        if (lane == 0) mbarrier_arrive(&shared.full[ring.slot]);
        ring.template advance<Config>();
        if (stages) stage(next, offset);
    }
    staged += steps;
}

// The lane's entry of the block table for a step's tile; any number where the tile has no such block.
template <typename Config>
__device__ int PrefillSm90Kernel<Config>::block_offset(int step) const {
    int which;
    int const start = tile_of(tile.past, step, which) * Config::kTileTokens;
    int const block = p.pool.block_of(start) + lane;
    bool const exists = block <= p.pool.block_of(min(start + Config::kTileTokens, tile.history) - 1);
    return exists ? p.pool.table(tile.sequence, KV(which))[block] : 0;
}

template <typename Config>
__device__ void PrefillSm90Kernel<Config>::stage(int step, int offset) {
    int which;
    int const start = tile_of(tile.past, step, which) * Config::kTileTokens;
    int const end = min(start + Config::kTileTokens, tile.history);
    int const blocks = p.pool.block_of(end - 1) - p.pool.block_of(start) + 1;
    int const row_bytes = which == kKey ? Config::kKeyRowBytes : Config::kValueRowBytes;
    int const bytes = min(p.pool.tokens_per_block, Config::kTileTokens) * row_bytes;
    int const count = staged + step, place = count % Config::kStaged;
    if (count >= Config::kStaged) mbarrier_wait(&shared.left[place], (count / Config::kStaged - 1) % 2);
    if (lane == 0) mbarrier_arrive_expect(&shared.arrived[place], blocks * bytes);
    __syncwarp();
    if (lane < blocks) {
        uint8_t const* const rows = p.pool.rows<Config::kKeyRowBytes, Config::kValueRowBytes>(offset, kv_head) +
                                    p.pool.row_of(start) * row_bytes;
        bulk_copy(shared.staged[place] + lane * bytes, rows, bytes, &shared.arrived[place]);
    }
}

// A thread makes a row, or half of one; what is none of [first, end), or lies before all windows, has a scale and a lo
// of 0. Neighbours read rows that lie an odd number of words apart, and write to chunks that the swizzle spreads.
// Channels need not be in order: the queries' and the output's are put into the same one.
template <typename Config>
template <int Bits, CodeOrder Order>
__device__ void PrefillSm90Kernel<Config>::dequantize(uint8_t const* source, uint64_t* left, int first, int end) {
    constexpr int kParts = 128 / Config::kTileTokens;
    constexpr int kRowWords = Config::kHeadDim * Bits / 32;  // of codes
    constexpr int kWords = kRowWords / kParts, kWordsOfEight = Bits / 4;
    // A thread's registers hold a row of 4 bits, and of 8 bits as many words or fewer.
    constexpr int kHeld = Bits == 4 ? kWords : kWords % 16 == 0 ? 16 : 8;
    int const row = threadIdx.x % Config::kTileTokens, part = kParts == 1 ? 0 : threadIdx.x / Config::kTileTokens;
    auto const* const words = reinterpret_cast<uint32_t const*>(source) + row * (kRowWords + 1);
    uint32_t const tail = row >= first && row < end ? words[kRowWords] : 0;
    uint8_t* target = nullptr;
#pragma unroll
    for (int from = 0; from < kWords; from += kHeld) {
        uint32_t codes[kHeld];
#pragma unroll
        for (int i = 0; i < kHeld; ++i) codes[i] = words[part * kWords + from + i];
        // Each thread for itself, which costs nothing here: racecheck follows no other order.
        if (from + kHeld == kWords) mbarrier_arrive(left);
        if (from == 0) {
            wait_for_slot();
            target = shared.slots[ring.slot] + row * 128;
        }
        constexpr int kAtOnce = 4;
        std::conditional_t<Bits == 4, Dequantizer, Dequantizer8> const dequantizer(tail);
#pragma unroll
        for (int i = 0; i < kHeld / kWordsOfEight; i += kAtOnce) {
            uint4 eights[kAtOnce];
            if constexpr (Bits == 4) {
                dequantizer.template run<Order>(codes + i, eights);
            } else {
                dequantizer.run(codes + i * kWordsOfEight, eights);
            }
#pragma unroll
            for (int j = 0; j < kAtOnce; ++j) {
                int const c = (part * kWords + from) / kWordsOfEight + i + j;
                *reinterpret_cast<uint4*>(target + (c / 8) * Config::kTileBoxBytes + ((c ^ row) % 8) * 16) = eights[j];
            }
        }
    }
}

}  // namespace saw
