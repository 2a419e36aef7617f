// Decode: one query token per sequence against its rows of codes in the pool, at the speed of the memory.
//
// The sequences' tokens, cut into tiles, form one work list. A persistent grid cuts it into equal splits, whatever the
// batch and the lengths, and a split is worked on by as many CTAs as there are KV heads, one for each: they read what
// lies side by side in a block at about the same time, which the memory rewards. Bulk copies load a tile's K and V
// rows to shared memory, some tiles ahead. Each of the CTA's four warps takes 16 of 64 tokens, scores them, and sums
// its own output; the warps meet only where the work list goes over to the next sequence. What a CTA could not finish
// by itself it leaves as a partial sum, and the last CTA to leave one for a (sequence, KV head) adds them up, in a
// fixed order.
//
// Nothing is dequantized: a mask is all it takes to make an exact operand of two codes (key_codes.cuh). Scale and lo
// are applied per token:
//   q.k = scale (q.code) + lo sum(q)        sum(p v) = sum((p scale) code) + sum(p lo)
// p scale is exp2(score + log2(scale)), so that whatever V's scales are, the operand of the product lies within fp16.
#pragma once

#include "saw/common/ptx.cuh"
#include "saw/paged_attention/decode/key_codes.cuh"
#include "saw/paged_attention/decode/work_list.cuh"

namespace saw {

// `Few` is for few and short sequences: the work list is cut between them where it can be, and what ends a split is
// quicker.
template <int HeadDim, int QueryTiles, int TileTokens, int Together, int Stages, int CtasPerSm, bool Few,
          int KeyBits = 4>
struct DecodeSm90Config {
    using Keys = KeyCodes<KeyBits, HeadDim>;
    using Splits = std::conditional_t<Few, EvenDecodeSplits, DecodeSplits>;
    static constexpr bool kFew = Few;
    static constexpr int kHeadDim = HeadDim;
    static constexpr int kQueryTiles = QueryTiles;  // tiles of 8 query heads that share a KV head
    static constexpr int kStages = Stages;
    static constexpr int kCtasPerSm = CtasPerSm;

    static constexpr int kWarps = 4;
    static constexpr int kThreads = kWarps * 32;
    static constexpr int kTileTokens = TileTokens;
    static constexpr int kSubtileTokens = 16 * kWarps;
    static constexpr int kTogether = Together;  // subtiles that a warp works on at a time, to hide its own latencies
    static constexpr int kRoundTokens = kTogether * kSubtileTokens;
    // A large tile is worked on as soon as its first half is there. No block is larger than half of it.
    static constexpr bool kHalves = TileTokens >= 256;
    static constexpr int kFirstTokens = kHalves ? TileTokens / 2 : TileTokens;
    static constexpr int kWords = HeadDim / 8;  // words of 8 codes in a row of V
    static constexpr int kKeyRowBytes = 4 * Keys::kRowWords;
    static constexpr int kValueRowBytes = int4_row_bytes(HeadDim);
    static constexpr int kValueRowWords = kValueRowBytes / 4;
    static constexpr int kKeyTileBytes = kTileTokens * kKeyRowBytes;
    static constexpr int kStageBytes = kKeyTileBytes + kTileTokens * kValueRowBytes;
    static constexpr int kValueSteps = (kWords + 7) / 8;  // words of a row of V that a thread sums
    static constexpr int kMaxQueries = 8 * QueryTiles;

    static_assert(kValueRowWords % 2 == 1, "an odd row length is what spreads rows over the banks");
    static_assert(kStageBytes % 128 == 0, "stages follow each other at aligned addresses");
    static_assert(TileTokens % kRoundTokens == 0, "each warp takes 16 tokens of a subtile");
};

template <typename Config>
struct DecodeSm90Shared {
    alignas(128) uint8_t stages[Config::kStages][Config::kStageBytes];
    uint64_t full[Config::kStages];  // of the tile, or of its first half
    uint64_t rest[Config::kStages];  // of its second half
    uint64_t empty[Config::kStages];
    float max[Config::kWarps][Config::kMaxQueries];
    float sum[Config::kWarps][Config::kMaxQueries];
    typename Config::Splits splits;
    DecodeCursor cursors[2];  // of the sequence that the warps work on, and of the one before or after it
    DecodeCursor ahead;       // of the next tile to load
    alignas(16) int warp_total[Config::kWarps];  // read as one vector: on its own, so that no neighbour is read with it
    int first_partial, partials;  // to be added up at the end of the split: of which split on, and how many
};

template <typename Config>
class DecodeSm90Kernel {
    using Keys = typename Config::Keys;
    // Scores of a warp's tokens: rows 4g and 4g + 1 of each subtile, queries 2t and 2t + 1 of each tile of queries.
    using Scores = float[Config::kTogether][Config::kQueryTiles][4];

  public:
    __device__ DecodeSm90Kernel(DecodeParams const& params, float* partials, int* counters,
                                DecodeSm90Shared<Config>& shared)
        : p(params),
          partials(partials),
          counters(counters),
          shared(shared),
          warp(threadIdx.x / 32),
          lane(threadIdx.x % 32),
          g(lane / 4),
          t(lane % 4),
          kv_head(blockIdx.x % params.pool.num_kv_heads),
          split(blockIdx.x / params.pool.num_kv_heads) {
        group = p.num_heads / p.pool.num_kv_heads;
        held_score_scale = p.softmax_scale * kLog2e;
        // The 16 tokens of this warp in each 64: rows first_row + 4 i + {0, 1} for i in 0..7. Rows 4 apart, for K, and
        // 8 apart, for V, lie 4 and 8 banks apart.
        first_row = (warp / 2) * 32 + (warp % 2) * 2;
    }

    template <typename T>
    __device__ void run();

  private:
    static constexpr float kNoMax = -1e30f;
    // The reference that exponents are taken against follows the maximum only when it lags by more than this: P stays
    // within fp16, and the sums need no correction for most tiles.
    static constexpr float kMaxLag = 8.0f;

    DecodeParams const& p;
    float* const partials;  // two for each CTA
    int* const counters;    // of each sequence and KV head: partial sums that have been left
    DecodeSm90Shared<Config>& shared;
    int const warp, lane, g, t;
    int const kv_head, split;
    int group, first_row;
    float held_score_scale;
    int which = 0;           // of the cursors
    int length, first_seen;  // of the current sequence
    // Warp 0's, as it loads tiles: how many are left of the split, and the next one's first token and sequence.
    int left, next_position, next_length;
    // Each two lanes hold the rows of a block, K's the even one and V's the odd one: 16 blocks from held_block on.
    uint8_t const* held_rows;
    int held_block;

    uint32_t q_frag[Config::kQueryTiles][Keys::kSteps][Keys::kOperands];
    float q_sum[Config::kQueryTiles][2];  // sum(q) of queries 2t, 2t+1, times score_scale
    float out[Config::kQueryTiles][Config::kValueSteps][4][4];
    float query_max[Config::kQueryTiles][2], query_sum[Config::kQueryTiles][2], query_lo[Config::kQueryTiles][2];

    // A head_dim of 256 leaves no register for it.
    __device__ float score_scale() const {
        return Config::kHeadDim < 256 ? held_score_scale : p.softmax_scale * kLog2e;
    }

    // Where the partial sums of a split lie: those of one KV head one after another, and then second ones.
    __device__ float* partial_of(int split, bool second) const {
        int const heads = p.pool.num_kv_heads, splits = int(gridDim.x) / heads;
        return partials +
               size_t((second * heads + kv_head) * splits + split) * decode_partial_floats(group, Config::kHeadDim);
    }

    __device__ int visible_tiles(int length, int& first_tile) const {
        first_tile = p.window > 0 && length > p.window ? (length - p.window) / Config::kTileTokens : 0;
        return (length + Config::kTileTokens - 1) / Config::kTileTokens - first_tile;
    }

    static __device__ void step(int& slot, uint32_t& parity, int& previous, uint32_t& previous_parity) {
        previous = slot;
        previous_parity = parity;
        if (++slot == Config::kStages) {
            slot = 0;
            parity ^= 1;
        }
    }

    __device__ bool find_work();
    __device__ int count_splits(int tiles) const;
    __device__ void enter_sequence(DecodeCursor& c, int sequence) const;
    __device__ void next_sequence(DecodeCursor& c) const;
    __device__ void start_loads();
    __device__ void hold_blocks();
    __device__ void issue_tile_load(int slot);
    template <typename T>
    __device__ void begin_sequence();
    template <typename T>
    __device__ void round(int position, uint8_t const* stage, int row);
    template <typename T>
    __device__ void softmax_update(int token, bool masked, __half2 const* key_tails, __half2 const* value_tails,
                                   Scores& s);
    __device__ void cap(float (&s)[Config::kQueryTiles][4], float const (&log_scale)[2]) const;
    __device__ void update_max(Scores const& s);
    __device__ void accumulate(uint32_t const* values, uint32_t const (&prob)[Config::kQueryTiles][2]);
    template <typename T>
    __device__ bool finish_sequence(int done, bool more, float* scratch);
    __device__ bool count_partial(DecodeCursor const& c, int& first_split, int& last_split) const;
    __device__ void merge_warps(float* scratch);
    template <typename T>
    __device__ void write_output();
    __device__ void write_partial(float* partial);
    template <typename T, int AtOnce>
    __device__ void combine(DecodeCursor const& c, int first_split, int count, int worker, int workers) const;
    template <typename T>
    __device__ void combine_on_the_way() const;
    template <typename T>
    __device__ void combine_at_end(int slot, uint32_t parity);
    template <typename T>
    __device__ void write_sum(int sequence, int x, int query, DecodeSum const& total) const;
    __device__ float normalizer(int query_head, float max, float sum) const;
};

}  // namespace saw

#include "saw/paged_attention/decode/attend_sm90.cuh"
#include "saw/paged_attention/decode/combine_sm90.cuh"
#include "saw/paged_attention/decode/schedule_sm90.cuh"

namespace saw {

template <typename Config>
template <typename T>
__device__ void DecodeSm90Kernel<Config>::run() {
    if (threadIdx.x == 0) {
        for (int i = 0; i < Config::kStages; ++i) {
            mbarrier_init(&shared.full[i], 1);
            mbarrier_init(&shared.rest[i], 1);
            mbarrier_init(&shared.empty[i], Config::kThreads);
        }
        fence_bulk_copy();
    }
    // The block table is read after the lengths; ask for it already.
    size_t const table_bytes = size_t(p.num_sequences) * 2 * p.pool.max_blocks_per_seq * sizeof(int32_t);
    for (size_t at = (size_t(blockIdx.x) * Config::kThreads + threadIdx.x) * 128; at < table_bytes;
         at += size_t(gridDim.x) * Config::kThreads * 128)
        prefetch_l2(reinterpret_cast<uint8_t const*>(p.pool.block_offsets) + at);
    // The queries are wanted when the copies of rows have been begun, and would come after them.
    size_t const query_bytes = size_t(p.num_sequences) * p.num_heads * Config::kHeadDim * sizeof(T);
    for (size_t at = (size_t(blockIdx.x) * Config::kThreads + threadIdx.x) * 128; at < query_bytes;
         at += size_t(gridDim.x) * Config::kThreads * 128)
        prefetch_l2(static_cast<uint8_t const*>(p.q) + at);
    bool const any = find_work();
    for (int s = blockIdx.x; s < p.num_sequences; s += gridDim.x) {
        if (p.sequence_length[s] > 0) continue;
        int const n = p.num_heads * Config::kHeadDim;
        for (int i = threadIdx.x; i < n; i += Config::kThreads) static_cast<T*>(p.out)[size_t(s) * n + i] = T(0.0f);
    }
    if (!any) return;
    if (warp == 0) {
        start_loads();
        for (int slot = 0; slot < Config::kStages && left > 0; ++slot) issue_tile_load(slot);
    }

    int slot = 0, previous = -1;
    uint32_t parity = 0, previous_parity = 0;
    while (true) {
        DecodeCursor const& c = shared.cursors[which];
        int position = (c.first_tile + c.tile) * Config::kTileTokens;
        int const done = min(c.begin + c.num_tiles, shared.splits.begin(split + 1));
        int tiles = done - c.begin - c.tile;
        begin_sequence<T>();
        while (true) {
            mbarrier_wait(&shared.full[slot], parity);
#pragma unroll 1
            for (int row = 0; row < Config::kTileTokens; row += Config::kRoundTokens) {
                if (Config::kHalves && row == Config::kFirstTokens) mbarrier_wait(&shared.rest[slot], parity);
                round<T>(position, shared.stages[slot], first_row + row);
                // By now all warps have most likely left the slot of the tile before.
                if (warp == 0 && row == 0 && previous >= 0 && left > 0) {
                    mbarrier_wait(&shared.empty[previous], previous_parity);
                    issue_tile_load(previous);
                }
            }
            mbarrier_arrive(&shared.empty[slot]);  // each thread for itself: racecheck follows no other order
            position += Config::kTileTokens;
            if (--tiles == 0) break;
            step(slot, parity, previous, previous_parity);
        }
        bool const more = done < shared.splits.begin(split + 1);
        bool const whole = finish_sequence<T>(done, more, reinterpret_cast<float*>(shared.stages[slot]));
        step(slot, parity, previous, previous_parity);
        if (!more) {
            if (!whole) combine_at_end<T>(slot, parity);
            return;
        }
        // Not the warp that loads the tiles.
        if (!whole && warp == Config::kWarps - 1) combine_on_the_way<T>();
        which ^= 1;
    }
}

template <typename Config, typename T>
__global__ void __launch_bounds__(Config::kThreads, Config::kCtasPerSm)
    decode_sm90_kernel(__grid_constant__ DecodeParams const params, float* partials, int* counters) {
    allow_next_grid();  // a product, whose weights are copied meanwhile to where CTAs have ended
    extern __shared__ __align__(128) uint8_t memory[];
    auto& shared = *reinterpret_cast<DecodeSm90Shared<Config>*>(memory);
    if constexpr (kHasBulkCopy) DecodeSm90Kernel<Config>(params, partials, counters, shared).template run<T>();
}

}  // namespace saw
