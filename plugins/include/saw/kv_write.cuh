// The write: a step's Q, K and V after their projection, each element read once and each result written once.
//
// A CTA works on one token. A warp takes a few of its rows, all of Q, of K or of V: a row is one head's channels, held
// by a few neighbouring lanes in fp32 registers (hadamard.cuh). A lane has 16 bytes of activations of a chunk, and,
// since its chunks lie head_dim / 2 apart, both channels of each RoPE pair.
#pragma once

#include <type_traits>

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include "saw/hadamard.cuh"
#include "saw/int4.cuh"
#include "saw/ops.h"

namespace saw {

// Lanes: of a row. Few are better for many tokens (less is shuffled, more rows share a warp's address arithmetic), many
// for few tokens (a row's chain of instructions is shorter).
template <int HeadDim, int Order, int Lanes, CacheType Cache, typename T>
struct KvWriteConfig {
    static constexpr int kHeadDim = HeadDim;
    static constexpr int kOrder = Order;  // of the rotation; 1 is none
    static constexpr int kLanes = Lanes;
    static constexpr CacheType kCache = Cache;
    using Activation = T;

    static constexpr int kChunks = HeadDim / 8;
    static constexpr int kSlots = kChunks / kLanes;
    static constexpr bool kPairsInLane = kSlots % 2 == 0;  // not for head_dim 96: three slots on four lanes
    static constexpr int kAngleSlots = kPairsInLane ? kSlots / 2 : kSlots;
    static constexpr int kRows = 32 / kLanes;  // of a warp
    static constexpr int kMaxWarps = 8;
    static constexpr int kCtasPerSm = kSlots == 2 ? 4 : kSlots == 4 ? 3 : 2;  // 64, 80, 128 registers a thread

    static_assert((kLanes & (kLanes - 1)) == 0 && kSlots * kLanes == kChunks, "lanes of a row are a shuffle's group");
    static_assert(int4_row_bytes(HeadDim) % 4 == 0, "rows are written word by word");
};

// Q, K or V among a token's rows and warps.
struct RowGroup {
    void* out;  // the tensor that takes the finished rows; or null
    int heads;
    int first_row;   // of the token's num_heads + 2 num_kv_heads
    int first_warp;  // of the token's
};
enum RowKind : int { kQueryRows = 0, kKeyRows = 1, kValueRows = 2 };

// What the host works out once for a launch.
struct KvWriteGrid {
    RowGroup groups[3];  // by RowKind
    int rows_per_token;
};

template <typename T>
__device__ inline float2 unpack_pair(uint32_t bits) {
    if constexpr (std::is_same_v<T, __half>) {
        return __half22float2(reinterpret_cast<__half2 const&>(bits));
    } else {
        return {__uint_as_float(bits << 16), __uint_as_float(bits & 0xffff0000u)};
    }
}

template <typename T>
__device__ inline uint32_t pack_pair(float low, float high) {
    if constexpr (std::is_same_v<T, __half>) {
        __half2 const pair = __floats2half2_rn(low, high);
        return reinterpret_cast<uint32_t const&>(pair);
    } else {
        __nv_bfloat162 const pair = __floats2bfloat162_rn(low, high);
        return reinterpret_cast<uint32_t const&>(pair);
    }
}

template <typename T>
__device__ inline void unpack_chunk(uint4 bits, float (&x)[8]) {
    uint32_t const words[4] = {bits.x, bits.y, bits.z, bits.w};
#pragma unroll
    for (int i = 0; i < 4; ++i) {
        float2 const pair = unpack_pair<T>(words[i]);
        x[2 * i] = pair.x;
        x[2 * i + 1] = pair.y;
    }
}

template <typename T, int kSlots>
__device__ inline void unpack_rows(uint4 const (&raw)[kSlots], float (&x)[kSlots][8]) {
#pragma unroll
    for (int s = 0; s < kSlots; ++s) unpack_chunk<T>(raw[s], x[s]);
}

template <typename T>
__device__ inline uint4 pack_chunk(float const (&x)[8]) {
    return {pack_pair<T>(x[0], x[1]), pack_pair<T>(x[2], x[3]), pack_pair<T>(x[4], x[5]), pack_pair<T>(x[6], x[7])};
}

// The sequence that holds a token, found by the whole warp: each round keeps one of 32 parts. -1 behind the last token.
__device__ inline int find_sequence(int32_t const* last_token_ids, int num_sequences, int token) {
    int const lane = threadIdx.x;
    int begin = 0, count = num_sequences;
    do {
        int const part = (count + 31) / 32;
        int const last = min(begin + min((lane + 1) * part, count), num_sequences) - 1;
        int const passed = __popc(__ballot_sync(~0u, __ldg(last_token_ids + last) <= token));
        if (passed == 32) return -1;
        begin += passed * part;
        count = part;
    } while (count > 1);
    return begin;
}

template <typename Config>
class KvWriteKernel {
  public:
    using T = typename Config::Activation;
    using Rows = float[Config::kSlots][8];

    __device__ KvWriteKernel(KvWriteParams const& params, KvWriteGrid const& grid)
        : p(params), grid(grid), token(blockIdx.x), lane(threadIdx.x % Config::kLanes) {}

    __device__ void run();

  private:
    KvWriteParams const& p;
    KvWriteGrid const& grid;
    int const token;
    int const lane;  // within the row's
    int kind;        // RowKind, the same in all lanes
    int head;        // behind the last head, the last is read again and nothing is written

    __device__ bool choose_rows();
    __device__ bool valid() const { return head < grid.groups[kind].heads; }
    __device__ int readable_head() const { return min(head, grid.groups[kind].heads - 1); }
    __device__ int chunk(int slot) const { return slot * Config::kLanes + lane; }
    __device__ uint4 const* source() const;
    __device__ int32_t table_entry(int sequence, int slot) const;
    __device__ uint8_t* pool_row(int32_t entry, int slot) const;
    __device__ void load_angles(int position, float (&angles)[Config::kAngleSlots][16]) const;
    __device__ void rope(Rows& x, float const (&angles)[Config::kAngleSlots][16]) const;
    __device__ void center(Rows& x) const;
    __device__ void write(Rows const& x, uint8_t* target) const;
    __device__ void write_int4(Rows const& x, uint8_t* target) const;
};

// The kind of this warp's rows and the head of this lane's. False for a warp too many.
template <typename Config>
__device__ bool KvWriteKernel<Config>::choose_rows() {
    int const warp = blockIdx.y * blockDim.y + threadIdx.y;
    kind = (warp >= grid.groups[kKeyRows].first_warp) + (warp >= grid.groups[kValueRows].first_warp);
    RowGroup const& group = grid.groups[kind];
    int const first = (warp - group.first_warp) * Config::kRows;
    head = first + threadIdx.x / Config::kLanes;
    return first < group.heads;
}

template <typename Config>
__device__ uint4 const* KvWriteKernel<Config>::source() const {
    size_t const row = size_t(token) * grid.rows_per_token + (grid.groups[kind].first_row + readable_head());
    return static_cast<uint4 const*>(p.qkv) + row * Config::kChunks;
}

template <typename Config>
__device__ int32_t KvWriteKernel<Config>::table_entry(int sequence, int slot) const {
    return __ldg(p.pool.table(sequence, kind == kKeyRows ? kKey : kValue) + p.pool.block_of(slot));
}

template <typename Config>
__device__ uint8_t* KvWriteKernel<Config>::pool_row(int32_t entry, int slot) const {
    return p.pool.rows(entry, head) + p.pool.row_of(slot) * row_bytes(Config::kCache, Config::kHeadDim);
}

// (cos, sin) of the pairs of this lane's chunks.
template <typename Config>
__device__ void KvWriteKernel<Config>::load_angles(int position, float (&angles)[Config::kAngleSlots][16]) const {
    float2 const* const line = p.cos_sin + size_t(position) * (Config::kHeadDim / 2);
#pragma unroll
    for (int s = 0; s < Config::kAngleSlots; ++s) {
        auto const* of_chunk = reinterpret_cast<float4 const*>(line + lane * 8) + s * Config::kLanes * 4;
        if (!Config::kPairsInLane && chunk(s) >= Config::kChunks / 2) of_chunk -= Config::kChunks / 2 * 4;
#pragma unroll
        for (int i = 0; i < 4; ++i) {
            float4 const two = __ldg(of_chunk + i);
            angles[s][4 * i] = two.x;
            angles[s][4 * i + 1] = two.y;
            angles[s][4 * i + 2] = two.z;
            angles[s][4 * i + 3] = two.w;
        }
    }
}

template <typename Config>
__device__ void KvWriteKernel<Config>::rope(Rows& x, float const (&angles)[Config::kAngleSlots][16]) const {
    if constexpr (Config::kPairsInLane) {
        constexpr int kHalf = Config::kSlots / 2;
#pragma unroll
        for (int s = 0; s < kHalf; ++s)
#pragma unroll
            for (int i = 0; i < 8; ++i) {
                float const a = x[s][i], b = x[s + kHalf][i], cos = angles[s][2 * i], sin = angles[s][2 * i + 1];
                x[s][i] = a * cos - b * sin;
                x[s + kHalf][i] = b * cos + a * sin;
            }
    } else {
        // Another lane has the pair's other channel, in another slot: to read it again costs less than to pass it on.
        constexpr int kHalf = Config::kChunks / 2;
#pragma unroll
        for (int s = 0; s < Config::kSlots; ++s) {
            bool const first = chunk(s) < kHalf;
            float other[8];
            unpack_chunk<T>(source()[first ? chunk(s) + kHalf : chunk(s) - kHalf], other);
#pragma unroll
            for (int i = 0; i < 8; ++i) {
                float const sin = first ? -angles[s][2 * i + 1] : angles[s][2 * i + 1];
                x[s][i] = x[s][i] * angles[s][2 * i] + other[i] * sin;
            }
        }
    }
}

template <typename Config>
__device__ void KvWriteKernel<Config>::center(Rows& x) const {
    auto const* const line = reinterpret_cast<float4 const*>(p.k_center + size_t(readable_head()) * Config::kHeadDim);
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

// Finished rows to the tensor that asks for them, and to `target` in the pool. Both may be null.
template <typename Config>
__device__ void KvWriteKernel<Config>::write(Rows const& x, uint8_t* target) const {
    void* const tensor = grid.groups[kind].out;
    if (tensor != nullptr || Config::kCache == CacheType::kRaw) {
        size_t const row = size_t(token) * grid.groups[kind].heads + head;
        uint4* const out = static_cast<uint4*>(tensor) + row * Config::kChunks + lane;
#pragma unroll
        for (int s = 0; s < Config::kSlots; ++s) {
            uint4 const bits = pack_chunk<T>(x[s]);
            if (valid() && tensor != nullptr) out[s * Config::kLanes] = bits;
            if (Config::kCache == CacheType::kRaw && valid() && target != nullptr)
                (reinterpret_cast<uint4*>(target) + lane)[s * Config::kLanes] = bits;
        }
    }
    if (Config::kCache == CacheType::kInt4 && target != nullptr) write_int4(x, target);
}

template <typename Config>
__device__ void KvWriteKernel<Config>::write_int4(Rows const& x, uint8_t* target) const {
    float lowest = x[0][0], highest = x[0][0];
#pragma unroll
    for (int s = 0; s < Config::kSlots; ++s)
#pragma unroll
        for (int i = 0; i < 8; ++i) {
            lowest = fminf(lowest, x[s][i]);
            highest = fmaxf(highest, x[s][i]);
        }
#pragma unroll
    for (int mask = 1; mask < Config::kLanes; mask *= 2) {
        lowest = fminf(lowest, __shfl_xor_sync(~0u, lowest, mask));
        highest = fmaxf(highest, __shfl_xor_sync(~0u, highest, mask));
    }
    RowScale const scale = row_scale(lowest, highest, p.range_factor);
    auto* const words = reinterpret_cast<uint32_t*>(target) + lane;
#pragma unroll
    for (int s = 0; s < Config::kSlots; ++s) {
        uint32_t const codes = quantize_word(x[s], scale);
        if (valid()) words[s * Config::kLanes] = codes;
    }
    if (valid() && lane == 0) words[Config::kChunks] = scale.tail;
}

template <typename Config>
__device__ void KvWriteKernel<Config>::run() {
    if (!choose_rows()) return;
    uint4 raw[Config::kSlots];
    uint4 const* const chunks = source() + lane;
#pragma unroll
    for (int s = 0; s < Config::kSlots; ++s) raw[s] = __ldcs(chunks + s * Config::kLanes);
    __syncwarp();  // or else the compiler puts these loads behind the wait for the position
    // The ways to the angles and to the slot are chains of loads: each is begun before what does not need it.
    int const position = __ldg(p.position_ids + token);
    int const sequence = kind == kQueryRows ? -1 : find_sequence(p.last_token_ids, p.num_sequences, token);
    int length = 0, last = 0;
    if (sequence >= 0) {
        length = __ldg(p.sequence_length + sequence);
        last = __ldg(p.last_token_ids + sequence);
    }

    Rows x;
    if (kind == kValueRows) {
        unpack_rows<T>(raw, x);
    } else {
        float angles[Config::kAngleSlots][16];
        load_angles(position, angles);
        unpack_rows<T>(raw, x);
        rope(x, angles);
    }
    if (kind == kKeyRows && p.k_center != nullptr) center(x);
    int const slot = length - (last - token);
    int32_t const entry = sequence < 0 ? 0 : table_entry(sequence, slot);
    if constexpr (Config::kOrder > 1) {
        if (kind != kValueRows || p.rotate_v) hadamard<Config::kOrder, Config::kLanes>(x);
    }
    write(x, sequence < 0 ? nullptr : pool_row(entry, slot));
}

template <typename Config>
__global__ void __launch_bounds__(32 * Config::kMaxWarps, Config::kCtasPerSm)
    kv_write_kernel(__grid_constant__ KvWriteParams const params, __grid_constant__ KvWriteGrid const grid) {
    KvWriteKernel<Config>(params, grid).run();
}

}  // namespace saw
