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
            if (warp < 2) {
                produce_dequantized<kKey>(warp);
            } else {
                produce_dequantized<kValue>(warp - 2);
            }
        } else {
            produce_rows(tile.past, false, warp);
        }
        index += gridDim.x;
        find(index);
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

// Tiles of codes: two warps make fp16 of the keys and two of the values, each pair by itself. Bulk copies stage the
// tiles as they are, two ahead.
template <typename Config>
template <KV Which>
__device__ void PrefillSm90Kernel<Config>::produce_dequantized(int warp) {
    int const tiles = tile.past.count(), lowest = tile.lowest(p.window);
    if (warp == 0) {
        for (int i = 0; i < min(Config::kStaged, tiles); ++i) stage<Which>(i, block_offset<Which>(i));
    }
    RingStep const first = ring;
    for (int i = 0; i < tiles; ++i) {
        int const start = (tile.past.last - i) * Config::kTileTokens;
        int const place = (staged + i) % Config::kStaged;
        // The tile that takes this one's place; its block table entry is asked for in time.
        int const next = i + Config::kStaged;
        bool const stages = warp == i % 2 && next < tiles;
        int offset = 0;
        if (stages) offset = block_offset<Which>(next);
        // The tile's place, as tile_of() has them: K 0, K 1, V 0, K 2, V 1 and so on, V's last two side by side.
        ring = first;
        ring.template advance<Config>(Which == kKey ? max(2 * i - 1, 0) : min(2 * i + 2, 2 * tiles - 1));
        mbarrier_wait(&shared.arrived[Which][place], (staged + i) / Config::kStaged % 2);
        dequantize<Which>(shared.staged[Which][place], &shared.left[Which][place], lowest - start,
                          tile.history - start);
        fence_bulk_copy();
        __syncwarp();
        // Two lanes for their warp and one of the other pair. racecheck does not follow that order.
        if (lane < 2) mbarrier_arrive(&shared.full[ring.slot]);
        if (stages) stage<Which>(next, offset);
    }
    ring = first;
    ring.template advance<Config>(2 * tiles);
    staged += tiles;
}

// The lane's entry of the block table for a tile, counted from the last; any number where it has no such block.
template <typename Config>
template <KV Which>
__device__ int PrefillSm90Kernel<Config>::block_offset(int index) const {
    int const start = (tile.past.last - index) * Config::kTileTokens;
    int const block = p.pool.block_of(start) + lane;
    bool const exists = block <= p.pool.block_of(min(start + Config::kTileTokens, tile.history) - 1);
    return exists ? p.pool.table(tile.sequence, Which)[block] : 0;
}

template <typename Config>
template <KV Which>
__device__ void PrefillSm90Kernel<Config>::stage(int index, int offset) {
    constexpr int kRowBytes = Which == kKey ? Config::kKeyRowBytes : Config::kValueRowBytes;
    int const start = (tile.past.last - index) * Config::kTileTokens;
    int const end = min(start + Config::kTileTokens, tile.history);
    int const blocks = p.pool.block_of(end - 1) - p.pool.block_of(start) + 1;
    int const bytes = min(p.pool.tokens_per_block, Config::kTileTokens) * kRowBytes;
    int const count = staged + index, place = count % Config::kStaged;
    uint64_t* const arrived = &shared.arrived[Which][place];
    if (count >= Config::kStaged) mbarrier_wait(&shared.left[Which][place], (count / Config::kStaged - 1) % 2);
    if (lane == 0) mbarrier_arrive_expect(arrived, blocks * bytes);
    __syncwarp();
    if (lane < blocks) {
        uint8_t const* const rows = p.pool.rows<Config::kKeyRowBytes, Config::kValueRowBytes>(offset, kv_head) +
                                    p.pool.row_of(start) * kRowBytes;
        bulk_copy(shared.staged[Which][place] + lane * bytes, rows, bytes, arrived);
    }
}

// A thread makes every 64th row; what is none of [first, end), or lies before all windows, has a scale and a lo of 0.
// Neighbours read rows that lie an odd number of words apart, and write to chunks that the swizzle spreads. Channels
// need not be in order: the queries' and the output's are put into the same one.
template <typename Config>
template <KV Which>
__device__ void PrefillSm90Kernel<Config>::dequantize(uint8_t const* source, uint64_t* left, int first, int end) {
    constexpr int kBits = Which == kKey ? Config::kKeyBits : 4;
    constexpr CodeOrder kOrder = Which == kKey ? Config::kKeyOrder : Config::kValueOrder;
    // A step makes 32 numbers of a row. Its codes are loaded a step or two before: the compiler would not move a load
    // across the stores.
    constexpr int kStepsOfRow = Config::kHeadDim / 32, kRows = Config::kTileTokens / 64, kSteps = kRows * kStepsOfRow;
    constexpr int kAhead = Config::kProducerRegisters < 72 ? 1 : 2;
    constexpr int kRowWords = kStepsOfRow * kBits + 1;
    int const thread = threadIdx.x % 64;
    auto const* const words = reinterpret_cast<uint32_t const*>(source) + thread * kRowWords;
    uint8_t* target = nullptr;
    uint32_t codes[kSteps][kBits], tails[kRows];
#pragma unroll
    for (int loaded = 0; loaded < kSteps + kAhead; ++loaded) {
        if (loaded < kSteps) {
            int const part = loaded / kStepsOfRow, row = part * 64 + thread;
            uint32_t const* const from = words + part * 64 * kRowWords;
            if (loaded % kStepsOfRow == 0) tails[part] = row >= first && row < end ? from[kRowWords - 1] : 0;
#pragma unroll
            for (int i = 0; i < kBits; ++i) codes[loaded][i] = from[loaded % kStepsOfRow * kBits + i];
        }
        // Each thread for itself, which costs nothing here: racecheck follows no other order.
        if (loaded == kSteps - 1) mbarrier_arrive(left);
        int const step = loaded - kAhead;
        if (step < 0) continue;
        if (step == 0) {
            wait_for_slot();
            target = shared.slots[ring.slot] + thread * 128;
        }
        uint4 eights[4];
        if constexpr (kBits == 4) {
            Dequantizer(tails[step / kStepsOfRow]).template run<kOrder>(codes[step], eights);
        } else {
            Dequantizer8(tails[step / kStepsOfRow]).run(codes[step], eights);
        }
#pragma unroll
        for (int i = 0; i < 4; ++i) {
            int const chunk = step % kStepsOfRow * 4 + i;
            uint8_t* const row = target + step / kStepsOfRow * 64 * 128 + chunk / 8 * Config::kTileBoxBytes;
            *reinterpret_cast<uint4*>(row + (chunk ^ thread) % 8 * 16) = eights[i];
        }
    }
}

}  // namespace saw
