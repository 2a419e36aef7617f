// Decode where rows do not come by bulk copies: 16-bit rows, whose chunks are permuted on their way to shared memory,
// and 4-bit rows before Hopper.
//
// The work list and its splits are those of pipeline_sm90.cuh. A CTA's warps take a split's tiles in turn, and each
// loads its own, K and V of a tile into a slot of its ring, some tiles ahead: so a warp waits for nobody until the
// list goes over to the next sequence. There the warps' sums meet. What a CTA could not finish by itself it leaves as a
// partial sum, and the last CTA to leave one for a (sequence, KV head) adds them up, in a fixed order. Where a group of
// query heads is too large for a CTA's registers, it takes two; the second reads from the L2 cache.
#pragma once

#include "saw/paged_attention/decode/rows_16bit.cuh"
#include "saw/paged_attention/decode/rows_int4.cuh"
#include "saw/paged_attention/decode/work_list.cuh"

namespace saw {

template <typename RowsOfTile, int TileTokens, int Stages, int Warps, int CtasPerSm>
struct DecodeSm80Config {
    using Rows = RowsOfTile;
    using T = typename Rows::T;
    static constexpr int kHeadDim = Rows::kHeadDim;
    static constexpr int kTileTokens = TileTokens;
    static constexpr int kStages = Stages;  // slots of a warp's ring
    static constexpr int kWarps = Warps;
    static constexpr int kThreads = Warps * 32;
    static constexpr int kCtasPerSm = CtasPerSm;
    static constexpr int kKeyTileBytes = TileTokens * Rows::kKeyRowBytes;
    static constexpr int kStageBytes = kKeyTileBytes + TileTokens * Rows::kValueRowBytes;
    static constexpr int kMaxQueries = 8 * Rows::kQueryTiles;

    static_assert(kStageBytes % 128 == 0, "slots follow each other at aligned addresses");
    static_assert(kMaxQueries * kHeadDim * sizeof(float) <= kStageBytes, "a warp leaves its sums in one slot");
};

template <typename Config>
struct DecodeSm80Shared {
    alignas(128) uint8_t stages[Config::kWarps][Config::kStages][Config::kStageBytes];
    struct Warp {
        DecodeSplits splits;
        DecodeCursor now;    // of the sequence that the warp works on
        DecodeCursor ahead;  // of the next tile to load
    } warps[Config::kWarps];
    // Of the sums that the warps leave: in which of the warp's slots they are, or -1.
    int scratch_slot[Config::kWarps];
    float max[Config::kWarps][Config::kMaxQueries];
    float sum[Config::kWarps][Config::kMaxQueries];
    bool is_last;
};

template <typename Config>
class DecodeSm80Kernel {
    using Rows = typename Config::Rows;
    using T = typename Config::T;
    static constexpr int kHeadDim = Config::kHeadDim;

  public:
    __device__ DecodeSm80Kernel(DecodeParams const& params, float* partials, int* counters, int min_share,
                                DecodeSm80Shared<Config>& shared)
        : p(params),
          partials(partials),
          counters(counters),
          shared(shared),
          min_share(min_share),
          warp(threadIdx.x / 32),
          lane(threadIdx.x % 32),
          split(blockIdx.z),
          kv_head(blockIdx.y),
          first_query(blockIdx.x * Config::kMaxQueries) {
        int const group = p.num_heads / p.pool.num_kv_heads;
        first_head = kv_head * group + first_query;
        partial_floats = decode_partial_floats(min(group, Config::kMaxQueries), kHeadDim);
        view.score_scale = p.softmax_scale * kLog2e;
        view.softcap = p.softcap;
        view.group = min(group - first_query, Config::kMaxQueries);
    }

    __device__ void run() {
        work();
        zero_empty_sequences();
    }

  private:
    // A sum of exp2(score - max) values, and four dims of the output that goes with it.
    struct Part {
        float max, sum;
        float out[4];

        __device__ void add(Part const& other) {
            float const top = fmaxf(max, other.max);
            float const keep = exp2_fast(max - top), weight = exp2_fast(other.max - top);
            max = top;
            sum = sum * keep + other.sum * weight;
#pragma unroll
            for (int i = 0; i < 4; ++i) out[i] = out[i] * keep + other.out[i] * weight;
        }
    };

    DecodeParams const& p;
    float* const partials;  // two for each CTA
    int* const counters;    // of each sequence and KV head: partial sums that have been left
    DecodeSm80Shared<Config>& shared;
    int const min_share;  // tiles that make a split of their own worthwhile: each split costs a partial sum
    int const warp, lane;
    // The grid is [splits, KV heads, CTAs that a group of query heads takes].
    int const split, kv_head, first_query;  // the last in its group
    int first_head;                         // of all query heads
    int partial_floats;
    DecodeView view;
    Rows rows;

    // Of the tiles that the warp loads: the next one's first token, its sequence's tokens, and how many are left.
    int next_position, next_length, next_seen, left;
    // Each two lanes hold where K's and V's part of a tile begin: of the next tiles, from lane held_at on. A part is a
    // tile, or a block's share of it where that is smaller; null where the query sees none of it.
    uint8_t const* held;
    int held_at;

    __device__ typename DecodeSm80Shared<Config>::Warp& mine() const { return shared.warps[warp]; }

    __device__ int column() const { return blockIdx.y * gridDim.x + blockIdx.x; }

    __device__ int columns() const { return gridDim.y * gridDim.x; }

    __device__ int seen_from(int length) const { return p.window > 0 ? max(length - p.window, 0) : 0; }

    __device__ int visible_tiles(int length, int& first_tile) const {
        first_tile = seen_from(length) / Config::kTileTokens;
        return (length + Config::kTileTokens - 1) / Config::kTileTokens - first_tile;
    }

    __device__ void work();
    __device__ bool find_work();
    __device__ void advance(DecodeCursor& c, int tiles) const;
    __device__ int part_tokens() const { return min(p.pool.tokens_per_block, Config::kTileTokens); }
    // K's and V's parts of a tile. part_tokens() is a power of two.
    __device__ int parts_per_tile() const { return (2 * Config::kTileTokens) >> (31 - __clz(part_tokens())); }
    __device__ void start_loads();
    __device__ void hold_parts();
    __device__ void issue_tile_load(int slot);
    __device__ void issue_copies(int slot);
    __device__ void finish_sequence(int used_slot);
    __device__ Part gather(int query, int dim) const;
    __device__ float* partial_of(int split, bool second) const {
        return partials + ((size_t(split) * columns() + column()) * 2 + second) * partial_floats;
    }
    __device__ void store_partial(float* partial, Part const& part, int query, int dim) const;
    __device__ bool is_last(int sequence, int others);
    __device__ void combine(DecodeCursor const& c, int first_split, int last_split) const;
    __device__ void write_output(Part const& part, int sequence, int query, int dim) const;
    __device__ void zero_empty_sequences() const;
};

}  // namespace saw

#include "saw/paged_attention/decode/combine_sm80.cuh"
#include "saw/paged_attention/decode/schedule_sm80.cuh"

namespace saw {

template <typename Config>
__device__ void DecodeSm80Kernel<Config>::work() {
    // The block table is read after the lengths; ask for it already.
    size_t const table_bytes = size_t(p.num_sequences) * 2 * p.pool.max_blocks_per_seq * sizeof(int32_t);
    size_t const cta = size_t(split) * columns() + column(), ctas = size_t(gridDim.z) * columns();
    for (size_t at = (cta * Config::kThreads + threadIdx.x) * 128; at < table_bytes;
         at += ctas * Config::kThreads * 128)
        prefetch_l2(reinterpret_cast<uint8_t const*>(p.pool.block_offsets) + at);
    if (!find_work()) return;
    start_loads();
    for (int slot = 0; slot < Config::kStages; ++slot) issue_tile_load(slot);

    DecodeCursor const& c = mine().now;
    int const end = mine().splits.begin(split + 1);
    int next = mine().splits.begin(split) + warp;  // tile on the work list
    int slot = 0;
    while (true) {
        int const done = min(c.begin + c.num_tiles, end);
        view.length = c.length;
        view.first_seen = seen_from(c.length);
        rows.begin(static_cast<T const*>(p.q) + (size_t(c.sequence) * p.num_heads + first_head) * kHeadDim, view.group,
                   view.score_scale);
        int used = -1;
        for (; next < done; next += Config::kWarps) {
            if (used >= 0) issue_tile_load(used);
            wait_for_copies<Config::kStages - 1>();
            __syncwarp();
            uint8_t const* const stage = shared.stages[warp][slot];
            int const position = (c.first_tile + next - c.begin) * Config::kTileTokens;
            rows.template attend<Config::kTileTokens>(stage, stage + Config::kKeyTileBytes, position, view);
            used = slot;
            if (++slot == Config::kStages) slot = 0;
        }
        finish_sequence(used);
        if (done == end) return;
        if (used >= 0) issue_tile_load(used);
        __syncwarp();  // all lanes have read mine().now
        if (lane == 0) advance(mine().now, done - c.begin - c.tile);
        __syncwarp();
    }
}

template <typename Config>
__global__ void __launch_bounds__(Config::kThreads, Config::kCtasPerSm)
    decode_sm80_kernel(__grid_constant__ DecodeParams const params, float* partials, int* counters, int min_share) {
    allow_next_grid();  // a product, whose weights are copied meanwhile to where CTAs have ended
    // On Hopper rows of codes are pipeline_sm90.cuh's, but for groups of more than 8 heads of 256.
    if constexpr (!kHopper || Config::Rows::kNeedsZeros || Config::kHeadDim > 128) {
        extern __shared__ __align__(128) uint8_t memory[];
        auto& shared = *reinterpret_cast<DecodeSm80Shared<Config>*>(memory);
        DecodeSm80Kernel<Config>(params, partials, counters, min_share, shared).run();
    }
}

}  // namespace saw
