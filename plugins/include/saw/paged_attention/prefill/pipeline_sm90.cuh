// Prefill on Hopper: the queries of a chunk against the sequence's history in the pool, and causally against the chunk
// itself. What pipeline_sm80.cuh does on other GPUs.
//
// A CTA takes 128 rows of queries: the heads that share a KV head, side by side, of some consecutive tokens. Four
// producer warps bring tiles of keys and values, 16 bits each, to a ring in shared memory; two groups of four consumer
// warps take 64 rows each through wgmma: while the tensor cores multiply for one group, the other computes its softmax,
// and within a group the scores of a tile are computed with the output of the tile before.
//
// The chunk's own keys come first, from the diagonal down, as they are. Rows of history follow, newest first: 16-bit
// rows as they are, rows of codes as fp16 numbers that the producers make of them, each row by one or two threads, in
// the time that the tensor cores leave. fp16, whatever the activations are: it holds code * scale + lo better than bf16
// does. So Q becomes fp16 between the chunk and the history, its channels in the order that is cheapest to give the
// keys.
#pragma once

#include <type_traits>

#include "saw/common/int4.cuh"
#include "saw/common/sm90.cuh"
#include "saw/paged_attention/prefill/tile.cuh"

namespace saw {

template <int HeadDim, typename T, CacheType Cache>
struct PrefillSm90Config {
    using Type = T;
    // Of the history in shared memory.
    static constexpr bool kCodes = Cache != CacheType::kUnquantized;
    using HistoryType = std::conditional_t<kCodes, __half, T>;
    static constexpr int kHeadDim = HeadDim;
    static constexpr int kKeyBits = key_bits(Cache);

    static constexpr int kConsumers = 2;
    static constexpr int kThreads = (kConsumers + 1) * 128;
    static constexpr int kRows = kConsumers * 64;  // of queries
    static constexpr int kTileTokens = HeadDim <= 128 ? 128 : 64;
    static constexpr int kBoxes = (HeadDim + 63) / 64;  // of 64 channels, 128 bytes a row
    static constexpr int kQueryBoxBytes = kRows * 128;
    static constexpr int kTileBoxBytes = kTileTokens * 128;
    static constexpr int kTileBytes = kBoxes * kTileBoxBytes;  // of K, or of V
    static constexpr int kKeyRowBytes = key_row_bytes(Cache, HeadDim), kValueRowBytes = row_bytes(Cache, HeadDim);
    static constexpr int kStagedBytes = kCodes ? kTileTokens * kKeyRowBytes : 0;
    static constexpr int kStaged = 2;  // tiles of codes on their way, of keys and of values
    static constexpr int kSharedBytes = 232448 - 1024;
    static constexpr int kSlots =
        (kSharedBytes - kBoxes * kQueryBoxBytes - 2 * kStaged * kStagedBytes) / kTileBytes < 6
            ? (kSharedBytes - kBoxes * kQueryBoxBytes - 2 * kStaged * kStagedBytes) / kTileBytes
            : 6;
    static constexpr int kScores = kTileTokens / 2;  // of a thread
    static constexpr int kOutputs = HeadDim / 2;
    // Of a thread, of the 168 times 384 that the CTA begins with. A head_dim of 256 has more outputs to hold. To make
    // fp16 of codes without waiting for the stores of those before takes registers.
    static constexpr int kProducerRegisters = HeadDim <= 128 ? kCodes ? 104 : 72 : kCodes ? 56 : 40;
    static constexpr int kConsumerRegisters = (168 * 3 - kProducerRegisters) / 2;

    // Of the channels of dequantized keys: codes of 8 bits come in order. And of values: to put the output into the
    // other order takes registers for a moment.
    static constexpr CodeOrder kKeyOrder = kKeyBits == 4 ? CodeOrder::kInterleaved : CodeOrder::kNatural;
    static constexpr CodeOrder kValueOrder = HeadDim <= 128 ? CodeOrder::kInterleaved : CodeOrder::kNatural;
    static constexpr bool kConvertsQueries =
        kCodes && (kKeyOrder == CodeOrder::kInterleaved || !std::is_same_v<T, HistoryType>);
    static constexpr bool kOrdersOutputs = kCodes && kValueOrder == CodeOrder::kInterleaved;

    // Also what makes a barrier's parity stand for one phase: a pair of producer warps has at least every third place,
    // so when it waits for one, it has seen that the place's use before the last is over.
    static_assert(kSlots >= 3, "K of the next tile, V of this one, and one on its way");
    static_assert(kStagedBytes % 128 == 0);
};

template <typename Config>
struct PrefillSm90Shared {
    alignas(1024) uint8_t queries[Config::kBoxes * Config::kQueryBoxBytes];
    alignas(1024) uint8_t slots[Config::kSlots][Config::kTileBytes];
    alignas(128) uint8_t staged[2][Config::kStaged][Config::kStagedBytes > 0 ? Config::kStagedBytes : 16];
    uint64_t full[Config::kSlots];
    uint64_t empty[Config::kSlots];
    uint64_t arrived[2][Config::kStaged];
    uint64_t left[2][Config::kStaged];
};

// What the copy engine has to know of the 16-bit rows: boxes are 64 channels wide.
struct PrefillMaps {
    CUtensorMap k, v;  // [num_tokens, num_kv_heads * head_dim], boxes of a tile's rows
    CUtensorMap pool;  // [rows, head_dim], boxes of a block's rows; unused for codes
};

// Places in the ring, in the order in which the consumers want the tiles of a phase: K of the first, then K of each
// next one before V of the last.
struct RingStep {
    int slot = 0;
    uint32_t parity = 0;

    template <typename Config>
    __device__ void advance(int steps = 1) {
        parity ^= (slot + steps) / Config::kSlots & 1;
        slot = (slot + steps) % Config::kSlots;
    }
};

template <typename Config>
class PrefillSm90Kernel {
    using T = typename Config::Type;
    using Shared = PrefillSm90Shared<Config>;

  public:
    __device__ PrefillSm90Kernel(PrefillParams const& params, PrefillMaps const& maps, Shared& shared)
        : p(params),
          maps(maps),
          shared(shared),
          lane(threadIdx.x % 32),
          group(params.num_heads / params.pool.num_kv_heads) {}

    __device__ void run();

  private:
    // Taken out of Q where it becomes fp16: room for large queries.
    static constexpr float kQueryUnit = std::is_same_v<T, __half> ? 1.0f : 16.0f;

    PrefillParams const& p;
    PrefillMaps const& maps;
    Shared& shared;
    int const lane;
    int const group;
    int kv_head;
    PrefillTile tile;
    RingStep ring;

    __device__ PrefillTile find_tile(int index) const {
        return find_prefill_tile<Config::kTileTokens>(p, Config::kRows / group, index);
    }
    __device__ void find(int index) {
        tile = find_tile(index);
        kv_head = index % p.pool.num_kv_heads;
    }

    // Producers.
    int staged = 0;  // tiles of codes so far
    __device__ void produce();
    __device__ void produce_rows(KeyTiles tiles, bool chunk, int warp);
    template <KV Which>
    __device__ void produce_dequantized(int warp);
    __device__ void copy_boxes(uint8_t* slot, int which, int start, bool chunk, uint64_t* full);
    __device__ void copy_rows(uint8_t* slot, int which, int start, int first, int valid, bool chunk, int warp);
    template <KV Which>
    __device__ int block_offset(int index) const;
    template <KV Which>
    __device__ void stage(int index, int offset);
    template <KV Which>
    __device__ void dequantize(uint8_t const* source, uint64_t* left, int first, int end);
    __device__ void wait_for_slot() const { mbarrier_wait(&shared.empty[ring.slot], ring.parity ^ 1); }
    // K (0) or V (1), and which tile, of a phase's step.
    static __device__ int tile_of(KeyTiles tiles, int step, int& which) {
        int const n = tiles.count();
        which = step == 2 * n - 1 || (step > 0 && step % 2 == 0) ? kValue : kKey;
        return tiles.last - (which == kKey ? (step + 1) / 2 : step == 2 * n - 1 ? n - 1 : step / 2 - 1);
    }

    // Consumers.
    __device__ void consume();
    __device__ void load_queries(int warpgroup, PrefillTile const& of, int head) const;
    __device__ void convert_queries(int warpgroup) const;
    template <bool Interleaved>
    __device__ void order_outputs();
    template <typename U>
    __device__ void attend(KeyTiles tiles, bool chunk, int warpgroup, float score_scale, bool last,
                           PrefillTile const& next, int next_head);
    template <typename U>
    __device__ void score(float (&s)[Config::kScores], uint32_t queries, uint32_t keys) const;
    template <typename U>
    __device__ void weigh(float (&o)[Config::kOutputs], uint32_t const (&prob)[Config::kScores / 2],
                          uint32_t values) const;
    __device__ void release(int slot) const {
        if (lane == 0) mbarrier_arrive(&shared.empty[slot]);
    }

    QueryRows rows;
    float out[Config::kOutputs];
};

}  // namespace saw

#include "saw/paged_attention/prefill/consume_sm90.cuh"
#include "saw/paged_attention/prefill/produce_sm90.cuh"

namespace saw {

template <typename Config>
__device__ void PrefillSm90Kernel<Config>::run() {
    if (threadIdx.x == 0) {
        for (int i = 0; i < Config::kSlots; ++i) {
            mbarrier_init(&shared.full[i], 4);
            mbarrier_init(&shared.empty[i], 4 * Config::kConsumers);
        }
        for (int i = 0; i < Config::kStaged; ++i) {
            for (KV which : {kKey, kValue}) {
                mbarrier_init(&shared.arrived[which][i], 1);
                mbarrier_init(&shared.left[which][i], 64);
            }
        }
        fence_bulk_copy();
    }
    __syncthreads();
    if (threadIdx.x < 128) {
        give_registers<Config::kProducerRegisters>();
        find(blockIdx.x);
        produce();
    } else {
        take_registers<Config::kConsumerRegisters>();
        find(blockIdx.x);
        consume();
    }
}

// Where it is not compiled for Hopper it does nothing, and says so by the threads that it takes: pipeline_sm80.cuh then
// does its work.
template <typename Config>
__global__ void __launch_bounds__(kHopper ? Config::kThreads : 32, 1)
    prefill_sm90_kernel(__grid_constant__ PrefillParams const params, __grid_constant__ PrefillMaps const maps) {
    if constexpr (kHopper) {
        extern __shared__ __align__(1024) uint8_t memory[];
        PrefillSm90Kernel<Config>(params, maps, *reinterpret_cast<PrefillSm90Shared<Config>*>(memory)).run();
    }
}

}  // namespace saw
