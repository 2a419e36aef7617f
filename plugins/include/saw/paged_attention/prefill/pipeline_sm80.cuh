// Prefill for the GPUs before Hopper, with what sm_80 has: pipeline_sm90.cuh, plainly.
//
// A CTA takes 64 rows of queries, the heads that share a KV head side by side of some consecutive tokens: four warps of
// 16 rows each through mma.m16n8k16. Tiles of keys and of values go through one slot of shared memory each: the values
// arrive while the scores are computed, and the next keys while the output is. The chunk's own tiles come first, from
// the diagonal down, then the history's, newest first.
//
// Rows of codes are brought as they are into the slot that they are to fill; there all threads take their codes out,
// and then put fp16 numbers in their place. With bf16 activations Q is rounded to fp16 once for them, between the
// chunk and the history.
#pragma once

#include <type_traits>

#include "saw/common/int4.cuh"
#include "saw/common/vec.cuh"
#include "saw/paged_attention/prefill/tile.cuh"

namespace saw {

template <int HeadDim, typename T, CacheType Cache>
struct PrefillSm80Config {
    using Type = T;
    // Of the history in shared memory.
    static constexpr bool kCodes = Cache != CacheType::kUnquantized;
    using HistoryType = std::conditional_t<kCodes, __half, T>;
    static constexpr int kHeadDim = HeadDim;
    static constexpr int kKeyBits = key_bits(Cache);

    static constexpr int kWarps = 4;
    static constexpr int kThreads = kWarps * 32;
    static constexpr int kRows = kWarps * 16;  // of queries
    // The output of 256 channels leaves registers for the scores of 32 keys.
    static constexpr int kTileTokens = HeadDim <= 128 ? 64 : 32;
    static constexpr int kChunks = HeadDim / 8;  // of 16 bytes, in a row
    static constexpr int kTileBytes = kTileTokens * HeadDim * 2;
    static constexpr int kKeyRowBytes = key_row_bytes(Cache, HeadDim), kValueRowBytes = row_bytes(Cache, HeadDim);
    static constexpr int kScores = kTileTokens / 2;  // of a thread
    static constexpr int kOutputs = HeadDim / 2;
};

template <typename Config>
struct PrefillSm80Shared {
    alignas(16) uint8_t queries[Config::kRows * Config::kHeadDim * 2];
    alignas(16) uint8_t slots[2][Config::kTileBytes];  // K and V
};

template <typename Config>
class PrefillSm80Kernel {
    using T = typename Config::Type;
    using HistoryType = typename Config::HistoryType;
    using Shared = PrefillSm80Shared<Config>;

  public:
    __device__ PrefillSm80Kernel(PrefillParams const& params, Shared& shared)
        : p(params),
          shared(shared),
          lane(threadIdx.x % 32),
          warp(threadIdx.x / 32),
          group(params.num_heads / params.pool.num_kv_heads),
          kv_head(blockIdx.x % params.pool.num_kv_heads) {}

    __device__ void run();

  private:
    // Taken out of Q where it becomes fp16: room for large queries.
    static constexpr float kQueryUnit = std::is_same_v<T, HistoryType> ? 1.0f : 16.0f;

    PrefillParams const& p;
    Shared& shared;
    int const lane, warp, group, kv_head;
    PrefillTile tile;
    QueryRows rows;
    float out[Config::kOutputs];

    // Where chunk c of a row lies in a tile: any eight rows have the same chunk in different banks.
    static __device__ int place(int row, int c) {
        int const moved = Config::kChunks % 8 == 0 ? c ^ (row % 8) : c ^ (row / 2 % 4);
        return (row * Config::kChunks + moved) * 16;
    }
    static_assert(Config::kChunks % 8 == 0 || Config::kChunks % 8 == 4);

    // An accumulator of mma.m16n8k16 among a thread's.
    template <int N>
    static __device__ float (&eight_columns(float (&x)[N], int index))[4] {
        return reinterpret_cast<float (&)[4]>(x[4 * index]);
    }

    __device__ void load_queries() const;
    __device__ void round_queries() const;
    __device__ void bring(KV which, int start, bool of_chunk) const;
    __device__ void bring_rows(KV which, int start, bool of_chunk) const;
    __device__ void bring_codes(KV which, int start) const;
    __device__ void wait_for(KV which, int start, bool of_chunk) const;
    template <int Bits>
    __device__ void dequantize(uint8_t* slot, int first, int end) const;
    template <typename U>
    __device__ void attend(KeyTiles tiles, bool of_chunk, float score_scale);
    template <typename U>
    __device__ void score(float (&s)[Config::kScores]) const;
    template <typename U>
    __device__ void weigh(float const (&s)[Config::kScores]);
};

template <typename Config>
__device__ void PrefillSm80Kernel<Config>::run() {
    tile = find_prefill_tile<Config::kTileTokens>(p, Config::kRows / group, blockIdx.x);
    if (tile.sequence < 0) return;
    int const row = warp * 16 + lane / 4;
    rows.begin(tile, row, group);
#pragma unroll
    for (float& x : out) x = 0.0f;
    load_queries();
    float const score_scale = p.softmax_scale * kLog2e;
    attend<T>(tile.own, true, score_scale);
    if (tile.past.count() > 0) {
        if constexpr (!std::is_same_v<T, HistoryType>) round_queries();
        attend<HistoryType>(tile.past, false, score_scale * kQueryUnit);
    }
    rows.template write<T>(out, p, tile, kv_head, group, row);
}

// A warp's 16 rows; those without a query become zeros.
template <typename Config>
__device__ void PrefillSm80Kernel<Config>::load_queries() const {
    auto const* const q = static_cast<T const*>(p.q);
    uint32_t const target = shared_address(shared.queries);
#pragma unroll 4
    for (int i = lane; i < 16 * Config::kChunks; i += 32) {
        int const row = warp * 16 + i / Config::kChunks, c = i % Config::kChunks;
        int const query = tile.begin + row / group;
        bool const exists = query < tile.end;
        size_t const source = size_t(tile.first_token + query) * p.num_heads + kv_head * group + row % group;
        copy_async(target + place(row, c), q + (exists ? source * Config::kHeadDim + c * 8 : 0), exists ? 16 : 0);
    }
}

// A warp's rows from bf16 to fp16, in place.
template <typename Config>
__device__ void PrefillSm80Kernel<Config>::round_queries() const {
    __syncwarp();
    auto* const mine = reinterpret_cast<uint4*>(shared.queries) + warp * 16 * Config::kChunks;
#pragma unroll 2
    for (int i = lane; i < 16 * Config::kChunks; i += 32) {
        uint4 eight = mine[i];
        for (uint32_t* pair : {&eight.x, &eight.y, &eight.z, &eight.w}) {
            float2 const x = __bfloat1622float2(reinterpret_cast<__nv_bfloat162 const&>(*pair));
            *pair = pack_half2(x.x * (1.0f / kQueryUnit), x.y * (1.0f / kQueryUnit));
        }
        mine[i] = eight;
    }
    __syncwarp();
}

// Begin to copy a tile to its slot, which everybody has left.
template <typename Config>
__device__ void PrefillSm80Kernel<Config>::bring(KV which, int start, bool of_chunk) const {
    if (Config::kCodes && !of_chunk) {
        bring_codes(which, start);
    } else {
        bring_rows(which, start, of_chunk);
    }
}

// Rows that do not exist, and those before all windows, become zeros: what lies there may be anything, and 0 * NaN is
// NaN.
template <typename Config>
__device__ void PrefillSm80Kernel<Config>::bring_rows(KV which, int start, bool of_chunk) const {
    auto const* const packed = static_cast<T const*>(which == kKey ? p.k : p.v);
    int const valid = (of_chunk ? tile.chunk : tile.history) - start;
    int const first = of_chunk ? 0 : tile.lowest(p.window) - start;
    uint32_t const target = shared_address(shared.slots[which]);
#pragma unroll 4
    for (int i = threadIdx.x; i < Config::kTileTokens * Config::kChunks; i += Config::kThreads) {
        int const row = i / Config::kChunks, c = i % Config::kChunks, token = start + row;
        T const* source = packed;
        bool const exists = row < valid && row >= first;
        if (exists && of_chunk) {
            source += (size_t(tile.first_token + token) * p.pool.num_kv_heads + kv_head) * Config::kHeadDim;
        } else if (exists) {
            int32_t const entry = p.pool.table(tile.sequence, which)[p.pool.block_of(token)];
            source = reinterpret_cast<T const*>(p.pool.rows(entry, kv_head)) + p.pool.row_of(token) * Config::kHeadDim;
        }
        copy_async(target + place(row, c), source + (exists ? c * 8 : 0), exists ? 16 : 0);
    }
}

// Rows of codes, one after the other at the slot's beginning. They are no multiple of 16 bytes, but what a tile has of
// a block is, and begins at one: whole blocks are copied, or whole tiles of them.
template <typename Config>
__device__ void PrefillSm80Kernel<Config>::bring_codes(KV which, int start) const {
    int const end = min(start + Config::kTileTokens, tile.history);
    int const row_bytes = which == kKey ? Config::kKeyRowBytes : Config::kValueRowBytes;
    int const tokens = min(p.pool.tokens_per_block, Config::kTileTokens), bytes = tokens * row_bytes;
    int32_t const* const table = p.pool.table(tile.sequence, which);
    uint32_t target = shared_address(shared.slots[which]);
    for (int token = start; token < end; token += tokens, target += bytes) {
        int32_t const entry = table[p.pool.block_of(token)];
        uint8_t const* const source = p.pool.rows<Config::kKeyRowBytes, Config::kValueRowBytes>(entry, kv_head) +
                                      p.pool.row_of(token) * row_bytes;
        for (int at = threadIdx.x * 16; at < bytes; at += Config::kThreads * 16)
            copy_async(target + at, source + at, 16);
    }
}

// Until a tile is in its slot. After it, everybody has left the other one.
template <typename Config>
__device__ void PrefillSm80Kernel<Config>::wait_for(KV which, int start, bool of_chunk) const {
    copy_async_wait();
    __syncthreads();
    if constexpr (Config::kCodes) {
        if (of_chunk) return;
        int const first = tile.lowest(p.window) - start, end = tile.history - start;
        if (which == kKey) {
            dequantize<Config::kKeyBits>(shared.slots[which], first, end);
        } else {
            dequantize<4>(shared.slots[which], first, end);
        }
    }
}

// A thread makes half of a row, or a quarter.
template <typename Config>
template <int Bits>
__device__ void PrefillSm80Kernel<Config>::dequantize(uint8_t* slot, int first, int end) const {
    constexpr int kEights = Config::kTileTokens * Config::kChunks / Config::kThreads, kWordsOfEight = Bits / 4;
    constexpr int kRowWords = Config::kHeadDim * Bits / 32;  // of codes
    int const row = threadIdx.x % Config::kTileTokens, chunk = threadIdx.x / Config::kTileTokens * kEights;
    auto const* const words = reinterpret_cast<uint32_t const*>(slot) + row * (kRowWords + 1);
    // What is no row has a scale and a lo of 0.
    uint32_t const tail = row >= first && row < end ? words[kRowWords] : 0;
    uint32_t codes[kEights * kWordsOfEight];
#pragma unroll
    for (int i = 0; i < kEights * kWordsOfEight; ++i) codes[i] = words[chunk * kWordsOfEight + i];
    __syncthreads();
    constexpr int kAtOnce = 2;
    std::conditional_t<Bits == 4, Dequantizer, Dequantizer8> const dequantizer(tail);
#pragma unroll
    for (int i = 0; i < kEights; i += kAtOnce) {
        uint4 eights[kAtOnce];
        if constexpr (Bits == 4) {
            dequantizer.template run<CodeOrder::kNatural>(codes + i, eights);
        } else {
            dequantizer.run(codes + i * kWordsOfEight, eights);
        }
#pragma unroll
        for (int j = 0; j < kAtOnce; ++j) *reinterpret_cast<uint4*>(slot + place(row, chunk + i + j)) = eights[j];
    }
    __syncthreads();
}

// One kind of tiles, from the last down.
template <typename Config>
template <typename U>
__device__ void PrefillSm80Kernel<Config>::attend(KeyTiles tiles, bool of_chunk, float score_scale) {
    constexpr int kTokens = Config::kTileTokens;
    bring(kKey, tiles.last * kTokens, of_chunk);
#pragma unroll 1
    for (int index = tiles.last; index >= tiles.first; --index) {
        int const start = index * kTokens;
        wait_for(kKey, start, of_chunk);
        bring(kValue, start, of_chunk);
        float s[Config::kScores];
        score<U>(s);
        if (p.softcap > 0.0f) cap_scores(s, p.softcap, score_scale);
        if (tile.hides(start, start + kTokens, of_chunk, p.window)) rows.mask(s, tile, start, of_chunk, p.window);
        float keep[2];
        rows.soften(s, score_scale, keep);
#pragma unroll
        for (int i = 0; i < Config::kOutputs; ++i) out[i] *= keep[i / 2 % 2];
        wait_for(kValue, start, of_chunk);
        if (index > tiles.first) bring(kKey, start - kTokens, of_chunk);
        weigh<U>(s);
    }
}

// S = Q K^T of a warp's rows and a tile.
template <typename Config>
template <typename U>
__device__ void PrefillSm80Kernel<Config>::score(float (&s)[Config::kScores]) const {
#pragma unroll
    for (float& x : s) x = 0.0f;
#pragma unroll
    for (int c = 0; c < Config::kChunks; c += 2) {
        uint32_t q[4];
        load_matrices(q, shared.queries + place(warp * 16 + lane % 16, c + lane / 16));
#pragma unroll
        for (int n = 0; n < Config::kTileTokens / 8; n += 2) {
            uint32_t k[4];  // two chunks of eight keys, and of the next eight
            load_matrices(k, shared.slots[kKey] + place(n * 8 + lane / 16 * 8 + lane % 8, c + lane / 8 % 2));
            mma_16x8x16<U>(eight_columns(s, n), q[0], q[1], q[2], q[3], k[0], k[1]);
            mma_16x8x16<U>(eight_columns(s, n + 1), q[0], q[1], q[2], q[3], k[2], k[3]);
        }
    }
}

// O += P V.
template <typename Config>
template <typename U>
__device__ void PrefillSm80Kernel<Config>::weigh(float const (&s)[Config::kScores]) {
#pragma unroll
    for (int n = 0; n < Config::kTileTokens / 8; n += 2) {
        uint32_t prob[4];
#pragma unroll
        for (int i = 0; i < 4; ++i) prob[i] = pack_pair<U>(s[4 * n + 2 * i], s[4 * n + 2 * i + 1]);
#pragma unroll
        for (int c = 0; c < Config::kChunks; c += 2) {
            uint32_t v[4];  // sixteen values of a chunk, and of the next
            load_matrices_transposed(v, shared.slots[kValue] + place(n * 8 + lane % 16, c + lane / 16));
            mma_16x8x16<U>(eight_columns(out, c), prob[0], prob[1], prob[2], prob[3], v[0], v[1]);
            mma_16x8x16<U>(eight_columns(out, c + 1), prob[0], prob[1], prob[2], prob[3], v[2], v[3]);
        }
    }
}

// Compiled wherever the version for Hopper is not.
template <typename Config>
__global__ void __launch_bounds__(Config::kThreads, Config::kHeadDim <= 128 ? 2 : 1)
    prefill_sm80_kernel(__grid_constant__ PrefillParams const params) {
    if constexpr (!kHopper) {
        extern __shared__ __align__(16) uint8_t plain_memory[];
        PrefillSm80Kernel<Config>(params, *reinterpret_cast<PrefillSm80Shared<Config>*>(plain_memory)).run();
    }
}

}  // namespace saw
