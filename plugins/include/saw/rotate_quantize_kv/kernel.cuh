// The write: a step's Q, K and V after their projection, each element read once and each result written once.
//
// A warp works on items, an item being a few rows of one token, all of Q, of K or of V. A row is one head's channels,
// held by a few neighbouring lanes in fp32 registers (hadamard.cuh). A lane has 16 bytes of activations of a chunk,
// and, since its chunks lie head_dim / 2 apart, both channels of each RoPE pair.
//
// With few tokens a warp has one item, and the time is that of a chain of loads and instructions: rows go straight from
// global memory to the registers and back. With many tokens (kStaged) a warp works on item after item. While it does,
// the next one is on its way to shared memory, and through shared memory all lines of global memory are read and
// written whole: the number of requests is what the L2 cache limits.
#pragma once

#include <type_traits>

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include "saw/common/hadamard.cuh"
#include "saw/common/int4.cuh"
#include "saw/common/ptx.cuh"
#include "saw/common/vec.cuh"
#include "saw/rotate_quantize_kv/params.h"

namespace saw {

// Lanes: of a row. Few are better for many tokens (fewer instructions, more rows share a warp's address arithmetic),
// many for few tokens (a row's chain of instructions is shorter).
template <int HeadDim, int Order, int Lanes, bool Staged, CacheType Cache, typename T>
struct RotateQuantizeKvConfig {
    static constexpr int kHeadDim = HeadDim;
    static constexpr int kOrder = Order;  // of the rotation; 1 is none
    static constexpr int kLanes = Lanes;
    static constexpr bool kStaged = Staged;
    static constexpr CacheType kCache = Cache;
    using Activation = T;

    static constexpr int kChunks = HeadDim / 8;  // of a row
    static constexpr int kSlots = kChunks / kLanes;
    static constexpr bool kPairsInLane = kSlots % 2 == 0;  // not for head_dim 96: three slots on four lanes
    static constexpr int kAngleSlots = kPairsInLane ? kSlots / 2 : kSlots;
    static constexpr int kRows = 32 / kLanes;                                                     // of an item
    static constexpr int kWarps = Staged ? 4 : 6;                                                 // of a CTA
    static constexpr int kRegisters = kSlots == 2 ? 64 : Staged ? 128 : kPairsInLane ? 80 : 112;  // of a thread
    static constexpr int kCtasPerSm = 65536 / (kRegisters * 32 * kWarps);

    static_assert((kLanes & (kLanes - 1)) == 0 && kSlots * kLanes == kChunks, "lanes of a row are a shuffle's group");
    static_assert(int4_row_bytes(HeadDim) % 4 == 0, "rows are written word by word");
};

// An item on its way in and out. Strides are such that a quarter of a warp meets each bank once, both in the order of
// global memory and in that of the registers.
template <typename Config>
struct RotateQuantizeKvStage {
    static constexpr int kSlotStride = 32 + Config::kLanes % 8;
    static constexpr int kAngleStride = Config::kChunks / 2 + 2;

    uint4 rows[Config::kSlots * kSlotStride];
    float4 angles[4 * kAngleStride];  // (cos, sin) of two pairs

    __device__ static int place(int row, int chunk) {
        return chunk / Config::kLanes * kSlotStride + row * Config::kLanes + chunk % Config::kLanes;
    }
    // Of the item's chunk 32 s + lane in the order of global memory.
    __device__ static int place_in_order(int lane, int s) {
        constexpr int kStep = 32 % Config::kChunks == 0 ? 32 / Config::kChunks : 0;
        if constexpr (kStep > 0) return place(lane / Config::kChunks, lane % Config::kChunks) + s * place(kStep, 0);
        return place((32 * s + lane) / Config::kChunks, (32 * s + lane) % Config::kChunks);
    }
    // Of the i-th quarter of the eight pairs of a chunk in a row's first half.
    __device__ static int angle_place(int chunk, int i) { return i * kAngleStride + chunk; }
};

// Q, K or V among a token's rows and items.
struct RowGroup {
    void* out;  // the tensor that takes the finished rows; or null
    int heads;
    int first_row;   // of the token's num_heads + 2 num_kv_heads
    int first_item;  // of the token's
};
enum RowKind : int { kQueryRows = 0, kKeyRows = 1, kValueRows = 2 };

// What the host works out once for a launch.
struct RotateQuantizeKvGrid {
    RowGroup groups[3];  // by RowKind
    int chunks_per_token;
    int block_bytes, head_bytes;  // of the pool
    int items_per_token;
    uint32_t items_reciprocal;  // ceil(2^32 / items_per_token)
    int warps;                  // that work; each takes every warps-th item
    int token_step, item_step;  // warps, as tokens and items of a token
};

// The sequence that holds a token, found by the whole warp: as many end before it. It is num_sequences after the last.
__device__ inline int find_sequence(int32_t const* last_token_ids, int num_sequences, int token) {
    int passed = 0;
#pragma unroll 4
    for (int i = threadIdx.x & 31; i < num_sequences; i += 32) passed += __ldg(last_token_ids + i) <= token;
    return __reduce_add_sync(~0u, passed);
}

template <typename Config>
class RotateQuantizeKvKernel {
  public:
    using T = typename Config::Activation;
    using Stage = RotateQuantizeKvStage<Config>;
    using Rows = float[Config::kSlots][8];

    __device__ RotateQuantizeKvKernel(RotateQuantizeKvParams const& params, RotateQuantizeKvGrid const& grid)
        : p(params), grid(grid), warp_lane(threadIdx.x & 31), lane(warp_lane % Config::kLanes) {}

    __device__ void run_one(int warp);
    __device__ void run_staged(int warp, Stage (&stages)[2]);

  private:
    // A few rows of one token.
    struct Item {
        int token;
        int index;  // of the token's items
        int kind;   // RowKind, the same in all lanes
        int head;   // the first row's
    };
    // Where in the pool an item's token goes; slot -1 is nowhere.
    struct Place {
        int32_t entry;  // of the block table
        int slot;
    };

    RotateQuantizeKvParams const& p;
    RotateQuantizeKvGrid const& grid;
    int const warp_lane;
    int const lane;  // of the row's

    // The sequence found last, the end of its tokens and its length.
    int sequence = 0, sequence_end = 0, sequence_length = 0;

    __device__ Item item_of(int token, int index) const;
    __device__ Item first_item(int warp) const;
    __device__ Item after(Item const& item) const;
    __device__ int position(Item const& item) const { return __ldg(p.position_ids + item.token); }
    __device__ bool exists(Item const& item) const { return item.token < p.num_tokens; }
    __device__ int rows_left(Item const& item) const { return grid.groups[item.kind].heads - item.head; }
    __device__ int row() const { return warp_lane / Config::kLanes; }  // of the item, this lane's
    __device__ int chunk(int slot) const { return slot * Config::kLanes + lane; }
    __device__ uint4 const* source(Item const& item) const;
    __device__ float4 const* angle_source(int position) const;

    __device__ void find(Item const& item);
    __device__ Place place(Item const& item) const;
    __device__ void fetch(Item const& item, Stage& stage) const;
    __device__ void fetch_angles(Item const& item, int position, Stage& stage) const;
    template <typename Angle, typename Chunk>
    __device__ void rope(Rows& x, Angle angle, Chunk chunk_at) const;
    __device__ void center(Item const& item, Rows& x) const;
    __device__ void rotate(Item const& item, Rows& x) const;
    __device__ void write(Item const& item, Place place, Rows const& x, Stage* stage) const;
    __device__ void write_16bit(Item const& item, Rows const& x, uint8_t* target, int row_stride, Stage* stage) const;
    template <int Bits>
    __device__ void write_codes(Item const& item, Rows const& x, uint8_t* target, int head_bytes, Stage* stage) const;
};

template <typename Config>
__device__ auto RotateQuantizeKvKernel<Config>::item_of(int token, int index) const -> Item {
    int const kind = (index >= grid.groups[kKeyRows].first_item) + (index >= grid.groups[kValueRows].first_item);
    return {token, index, kind, (index - grid.groups[kind].first_item) * Config::kRows};
}

template <typename Config>
__device__ auto RotateQuantizeKvKernel<Config>::first_item(int warp) const -> Item {
    int const token = __umulhi(warp, grid.items_reciprocal);
    return item_of(token, warp - token * grid.items_per_token);
}

template <typename Config>
__device__ auto RotateQuantizeKvKernel<Config>::after(Item const& item) const -> Item {
    int const index = item.index + grid.item_step, over = index >= grid.items_per_token;
    return item_of(item.token + grid.token_step + over, over ? index - grid.items_per_token : index);
}

template <typename Config>
__device__ uint4 const* RotateQuantizeKvKernel<Config>::source(Item const& item) const {
    return static_cast<uint4 const*>(p.qkv) + int64_t(item.token) * grid.chunks_per_token +
           (grid.groups[item.kind].first_row + item.head) * Config::kChunks;
}

template <typename Config>
__device__ float4 const* RotateQuantizeKvKernel<Config>::angle_source(int position) const {
    return reinterpret_cast<float4 const*>(p.cos_sin) + int64_t(position) * (Config::kHeadDim / 4);
}

// Find the token's sequence, if its rows are stored. A warp's tokens only grow.
template <typename Config>
__device__ void RotateQuantizeKvKernel<Config>::find(Item const& item) {
    if (item.kind == kQueryRows) return;
    if (item.token >= sequence_end && sequence < p.num_sequences) {
        sequence = find_sequence(p.last_token_ids, p.num_sequences, item.token);
        if (sequence < p.num_sequences) {
            sequence_end = __ldg(p.last_token_ids + sequence);
            sequence_length = __ldg(p.sequence_length + sequence);
        }
    }
    if (p.decode_counters == nullptr || item.kind != kKeyRows || sequence == p.num_sequences) return;
    if (warp_lane < min(Config::kRows, rows_left(item)))
        p.decode_counters[sequence * p.pool.num_kv_heads + item.head + warp_lane] = 0;
}

template <typename Config>
__device__ auto RotateQuantizeKvKernel<Config>::place(Item const& item) const -> Place {
    if (item.kind == kQueryRows || sequence == p.num_sequences) return {0, -1};
    int const slot = sequence_length - (sequence_end - item.token);
    int32_t const* const table = p.pool.table(sequence, item.kind == kKeyRows ? kKey : kValue);
    return {__ldg(table + p.pool.block_of(slot)), slot};
}

// Begin to copy an item's rows. After the last head there are zeros.
template <typename Config>
__device__ void RotateQuantizeKvKernel<Config>::fetch(Item const& item, Stage& stage) const {
    int const left = rows_left(item) * Config::kChunks - warp_lane;
    uint4 const* const chunks = source(item) + warp_lane;
    uint32_t const target = shared_address(stage.rows);
#pragma unroll
    for (int s = 0; s < Config::kSlots; ++s)
        copy_async(target + Stage::place_in_order(warp_lane, s) * 16, chunks + 32 * s, 32 * s < left ? 16 : 0);
}

template <typename Config>
__device__ void RotateQuantizeKvKernel<Config>::fetch_angles(Item const& item, int position, Stage& stage) const {
    if (item.kind == kValueRows) return;
    constexpr int kPieces = Config::kHeadDim / 4;
    float4 const* const pieces = angle_source(position) + warp_lane;
    uint32_t const target = shared_address(stage.angles) + Stage::angle_place(warp_lane / 4, warp_lane % 4) * 16;
#pragma unroll
    for (int i = 0; i < kPieces; i += 32)
        if (i + warp_lane < kPieces) copy_async_cached(target + Stage::angle_place(i / 4, 0) * 16, pieces + i);
}

// angle(s, c, i): (cos, sin) of two pairs, the i-th quarter of chunk c in a row's first half, for slot s.
// chunk_at(c): this row's activations.
template <typename Config>
template <typename Angle, typename Chunk>
__device__ void RotateQuantizeKvKernel<Config>::rope(Rows& x, Angle angle, Chunk chunk_at) const {
    if constexpr (Config::kPairsInLane) {
        constexpr int kHalf = Config::kSlots / 2;
#pragma unroll
        for (int s = 0; s < kHalf; ++s)
#pragma unroll
            for (int i = 0; i < 4; ++i) {
                float4 const two = angle(s, chunk(s), i);
#pragma unroll
                for (int j = 2 * i; j < 2 * i + 2; ++j) {
                    float const a = x[s][j], b = x[s + kHalf][j];
                    float const cos = j % 2 ? two.z : two.x, sin = j % 2 ? two.w : two.y;
                    x[s][j] = a * cos - b * sin;
                    x[s + kHalf][j] = b * cos + a * sin;
                }
            }
    } else {
        // Another lane has the pair's other channel.
        constexpr int kHalf = Config::kChunks / 2;
#pragma unroll
        for (int s = 0; s < Config::kSlots; ++s) {
            bool const first = chunk(s) < kHalf;
            int const other_chunk = first ? chunk(s) + kHalf : chunk(s) - kHalf;
            float other[8];
            unpack_chunk<T>(chunk_at(other_chunk), other);
#pragma unroll
            for (int i = 0; i < 4; ++i) {
                float4 const two = angle(s, first ? chunk(s) : other_chunk, i);
                x[s][2 * i] = x[s][2 * i] * two.x + other[2 * i] * (first ? -two.y : two.y);
                x[s][2 * i + 1] = x[s][2 * i + 1] * two.z + other[2 * i + 1] * (first ? -two.w : two.w);
            }
        }
    }
}

template <typename Config>
__device__ void RotateQuantizeKvKernel<Config>::center(Item const& item, Rows& x) const {
    if (item.kind != kKeyRows || p.k_center == nullptr) return;
    int const head = item.head + min(row(), rows_left(item) - 1);
    auto const* const line = reinterpret_cast<float4 const*>(p.k_center) + head * (Config::kHeadDim / 4);
#pragma unroll
    for (int s = 0; s < Config::kSlots; ++s)
#pragma unroll
        for (int i = 0; i < 2; ++i) {
            float4 const c = __ldg(line + chunk(s) * 2 + i);
            x[s][4 * i] -= c.x;
            x[s][4 * i + 1] -= c.y;
            x[s][4 * i + 2] -= c.z;
            x[s][4 * i + 3] -= c.w;
        }
}

template <typename Config>
__device__ void RotateQuantizeKvKernel<Config>::rotate(Item const& item, Rows& x) const {
    if constexpr (Config::kOrder > 1) {
        if (item.kind != kValueRows || p.rotate_v) hadamard<Config::kOrder, Config::kLanes, Config::kStaged>(x);
    }
}

// Finished rows to the tensor that asks for them and to the pool; by way of a stage, if there is one.
template <typename Config>
__device__ void RotateQuantizeKvKernel<Config>::write(Item const& item, Place place, Rows const& x,
                                                      Stage* stage) const {
    RowGroup const& group = grid.groups[item.kind];
    if (group.out != nullptr) {
        int64_t const first = int64_t(item.token) * group.heads + item.head;
        constexpr int kRowBytes = Config::kChunks * 16;
        write_16bit(item, x, static_cast<uint8_t*>(group.out) + first * kRowBytes, kRowBytes, stage);
    }
    if (place.slot < 0) return;
    if constexpr (Config::kCache == CacheType::kKey8Value4) {
        constexpr int kKeyRowBytes = int8_row_bytes(Config::kHeadDim),
                      kValueRowBytes = int4_row_bytes(Config::kHeadDim);
        uint8_t* const rows = p.pool.rows<kKeyRowBytes, kValueRowBytes>(place.entry, item.head);
        int const token = p.pool.row_of(place.slot);
        if (item.kind == kKeyRows) {
            write_codes<8>(item, x, rows + token * kKeyRowBytes, p.pool.tokens_per_block * kKeyRowBytes, stage);
        } else {
            write_codes<4>(item, x, rows + token * kValueRowBytes, grid.head_bytes, stage);
        }
        return;
    }
    uint32_t const block = uint32_t(p.pool.layer) * 2 + (place.entry & 0x7fffffff);
    uint8_t* const target =
        p.pool.base + uint64_t(block) * uint32_t(grid.block_bytes) +
        (item.head * grid.head_bytes + p.pool.row_of(place.slot) * row_bytes(Config::kCache, Config::kHeadDim));
    if constexpr (Config::kCache == CacheType::kInt4) {
        write_codes<4>(item, x, target, grid.head_bytes, stage);
    } else {
        write_16bit(item, x, target, grid.head_bytes, stage);
    }
}

template <typename Config>
__device__ void RotateQuantizeKvKernel<Config>::write_16bit(Item const& item, Rows const& x, uint8_t* target,
                                                            int row_stride, Stage* stage) const {
    if constexpr (Config::kStaged) {
#pragma unroll
        for (int s = 0; s < Config::kSlots; ++s) stage->rows[s * Stage::kSlotStride + warp_lane] = pack_chunk<T>(x[s]);
        __syncwarp();
        uint4 out[Config::kSlots];
#pragma unroll
        for (int s = 0; s < Config::kSlots; ++s) out[s] = stage->rows[Stage::place_in_order(warp_lane, s)];
        int const left = rows_left(item) * Config::kChunks - warp_lane;
#pragma unroll
        for (int s = 0; s < Config::kSlots; ++s) {
            int const i = 32 * s + warp_lane, offset = i / Config::kChunks * row_stride + i % Config::kChunks * 16;
            store_if(32 * s < left, target + offset, out[s]);
        }
        __syncwarp();
    } else {
        auto* const chunks = reinterpret_cast<uint4*>(target + row() * row_stride) + lane;
#pragma unroll
        for (int s = 0; s < Config::kSlots; ++s)
            store_if(row() < rows_left(item), chunks + s * Config::kLanes, pack_chunk<T>(x[s]));
    }
}

// `head_bytes` lie between a row and the next head's. Codes of 8 bits span the whole range.
template <typename Config>
template <int Bits>
__device__ void RotateQuantizeKvKernel<Config>::write_codes(Item const& item, Rows const& x, uint8_t* target,
                                                            int head_bytes, Stage* stage) const {
    // Slot by slot first: short chains.
    float lowest = x[0][0], highest = x[0][0];
#pragma unroll
    for (int s = 0; s < Config::kSlots; ++s) {
        float low = x[s][0], high = x[s][0];
#pragma unroll
        for (int i = 1; i < 8; ++i) {
            low = fminf(low, x[s][i]);
            high = fmaxf(high, x[s][i]);
        }
        lowest = s == 0 ? low : fminf(lowest, low);
        highest = s == 0 ? high : fmaxf(highest, high);
    }
#pragma unroll
    for (int mask = 1; mask < Config::kLanes; mask *= 2) {
        lowest = fminf(lowest, __shfl_xor_sync(~0u, lowest, mask));
        highest = fmaxf(highest, __shfl_xor_sync(~0u, highest, mask));
    }
    RowScale const scale = row_scale<Bits>(lowest, highest, Bits == 4 ? p.range_factor : 1.0f);
    constexpr int kWordsOfChunk = Bits / 4, kCodeWords = Config::kChunks * kWordsOfChunk, kRowWords = kCodeWords + 1;
    if constexpr (Config::kStaged) {
        auto* const words = reinterpret_cast<uint32_t*>(stage->rows);
#pragma unroll
        for (int s = 0; s < Config::kSlots; ++s)
#pragma unroll
            for (int i = 0; i < kWordsOfChunk; ++i)
                words[row() * kRowWords + chunk(s) * kWordsOfChunk + i] = quantize_word<Bits>(x[s], scale, 4 * i);
        if (lane == 0) words[row() * kRowWords + kCodeWords] = scale.tail;
        __syncwarp();
        constexpr int kPieces = (Config::kRows * kRowWords + 31) / 32;
        uint32_t out[kPieces];
#pragma unroll
        for (int i = 0; i < kPieces; ++i) out[i] = words[32 * i + warp_lane];
        int const left = min(Config::kRows, rows_left(item)) * kRowWords - warp_lane;
#pragma unroll
        for (int i = 0; i < kPieces; ++i) {
            int const word = 32 * i + warp_lane, offset = word / kRowWords * head_bytes + word % kRowWords * 4;
            store_if(32 * i < left, target + offset, out[i]);
        }
        __syncwarp();
    } else {
        auto* const words = reinterpret_cast<uint32_t*>(target + row() * head_bytes);
        bool const valid = row() < rows_left(item);
#pragma unroll
        for (int s = 0; s < Config::kSlots; ++s)
#pragma unroll
            for (int i = 0; i < kWordsOfChunk; ++i)
                store_if(valid, words + chunk(s) * kWordsOfChunk + i, quantize_word<Bits>(x[s], scale, 4 * i));
        store_if(valid && lane == 0, words + kCodeWords, scale.tail);
    }
}

template <typename Config>
__device__ void RotateQuantizeKvKernel<Config>::run_one(int warp) {
    Item const item = first_item(warp);
    uint4 const* const chunks = source(item) + min(row(), rows_left(item) - 1) * Config::kChunks;
    uint4 packed[Config::kSlots];
#pragma unroll
    for (int s = 0; s < Config::kSlots; ++s) packed[s] = __ldcs(chunks + chunk(s));
    __syncwarp();  // or else the compiler puts these loads after the wait for the position
    // The ways to the angles and to the slot are chains of loads: each is begun before what does not need it.
    int const item_position = position(item);
    find(item);
    float4 angles[Config::kAngleSlots][4];
    if (item.kind != kValueRows) {
#pragma unroll
        for (int s = 0; s < Config::kAngleSlots; ++s)
#pragma unroll
            for (int i = 0; i < 4; ++i)
                angles[s][i] = __ldg(angle_source(item_position) + chunk(s) % (Config::kChunks / 2) * 4 + i);
    }
    Rows x;
#pragma unroll
    for (int s = 0; s < Config::kSlots; ++s) unpack_chunk<T>(packed[s], x[s]);
    // Not by __ldg(), which is for what nobody writes as long as this kernel is there, while it waits too.
    if (item.kind != kValueRows)
        rope(x, [&](int s, int, int i) { return angles[s][i]; }, [&](int c) { return __ldcs(chunks + c); });
    center(item, x);
    Place const where = place(item);
    rotate(item, x);
    write(item, where, x, nullptr);
}

template <typename Config>
__device__ void RotateQuantizeKvKernel<Config>::run_staged(int warp, Stage (&stages)[2]) {
    Item item = first_item(warp);
    fetch(item, stages[0]);
    find(item);
    Place where = place(item);
    fetch_angles(item, position(item), stages[0]);
    end_copy_group();
    Item next = after(item);
    int next_position = exists(next) ? position(next) : 0;
    for (int i = 0; exists(item); i ^= 1) {
        if (exists(next)) {
            fetch(next, stages[i ^ 1]);
            fetch_angles(next, next_position, stages[i ^ 1]);
        }
        end_copy_group();
        wait_for_copies<1>();
        __syncwarp();
        Stage& stage = stages[i];
        Rows x;
#pragma unroll
        for (int s = 0; s < Config::kSlots; ++s) unpack_chunk<T>(stage.rows[s * Stage::kSlotStride + warp_lane], x[s]);
        if (item.kind != kValueRows)
            rope(
                x, [&](int, int c, int i) { return stage.angles[Stage::angle_place(c, i)]; },
                [&](int c) { return stage.rows[Stage::place(row(), c)]; });
        __syncwarp();
        Place next_place = {0, -1};
        if (exists(next)) {
            find(next);
            next_place = place(next);
        }
        center(item, x);
        rotate(item, x);
        write(item, where, x, &stage);
        item = next;
        where = next_place;
        next = after(next);
        if (exists(next)) next_position = position(next);
    }
}

template <typename Config>
__global__ void __launch_bounds__(32 * Config::kWarps, Config::kCtasPerSm)
    rotate_quantize_kv_kernel(__grid_constant__ RotateQuantizeKvParams const params,
                              __grid_constant__ RotateQuantizeKvGrid const grid) {
    wait_for_last_grid();
    allow_next_grid();
    int const warp = blockIdx.x * Config::kWarps + threadIdx.y;
    if (warp >= grid.warps) return;
    RotateQuantizeKvKernel<Config> kernel(params, grid);
    if constexpr (Config::kStaged) {
        __shared__ RotateQuantizeKvStage<Config> stages[Config::kWarps][2];
        kernel.run_staged(warp, stages[threadIdx.y]);
    } else {
        kernel.run_one(warp);
    }
}

}  // namespace saw
