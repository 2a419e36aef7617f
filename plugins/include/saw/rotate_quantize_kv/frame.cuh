// The write with calibrated frames: Q and K of a token times a matrix of their KV head, in the Hadamard blocks' place.
//
// A CTA works on a run of tiles, a tile being 32 rows of Q, of K or of V of one KV head. A thread takes a chunk of
// eight channels of a row's first half and the one of its second half, so both channels of each RoPE pair, and leaves
// them in shared memory as the operand of the tensor cores. A warp multiplies the tile by 16 columns of the matrix,
// which its registers hold from the start on: they are fetched before anything that depends on the step. V is
// multiplied too, by the Hadamard matrix if it is to be rotated, else by the identity.
//
// What is multiplied is split into two numbers of fp16, high + low / 2^11, which are 22 bits together:
//     x M = high(x) high(M) + (high(x) low(M) + low(x) high(M)) / 2^11
// The product that is left out and what the parts leave of each number are at most 3 2^-22 |x| |M| of each term, and
// the fp32 sums of the tensor cores lose 2^-23 of a partial sum in each step: next to what fp32 would lose. So it is
// for K, whose codes are to be the reference's, and for Q of fp16, whose output has as many bits as a part. Q of bf16
// is rounded by 2^-8 in the end; high(x) high(M) alone is off by at most 2^-10 of each term, and since that is random,
// by a sixth of that rounding on average.
//
// A frame in memory is fp16 [2 (high, low), head_dim / 16 (warps), head_dim / 16 (k / 16), 32 (lanes), 8]: what a lane
// takes for two products m16n8k16 side by side. With g = lane / 4 and t = lane % 4, of the eight numbers number
// 4 j + 2 h + i is row 16 (k / 16) + 8 h + 2 t + i and column 16 warp + 4 (g / 2) + 2 j + g % 2 of the matrix. Columns
// are in this order so that a lane's four sums of a row are neighbors.
#pragma once

#include <type_traits>

#include "saw/common/hadamard.cuh"
#include "saw/common/int4.cuh"
#include "saw/common/ptx.cuh"
#include "saw/rotate_quantize_kv/kernel.cuh"
#include "saw/rotate_quantize_kv/params.h"

namespace saw {

template <int HeadDim, typename T>
struct FrameConfig {
    static constexpr int kHeadDim = HeadDim;
    using Activation = T;

    static constexpr int kRows = 32;             // of a tile
    static constexpr int kSteps = HeadDim / 16;  // of the reduction index
    static constexpr int kWarps = HeadDim / 16;
    static constexpr int kThreads = 32 * kWarps;
    static constexpr int kChunks = HeadDim / 8;  // of a row
    static constexpr int kThreadsOfRow = kChunks / 2;
    static constexpr int kRowWords = int4_row_bytes(HeadDim) / 4;
    // The matrix of head_dim 256 is more than the registers of a CTA.
    static constexpr bool kInRegisters = HeadDim <= 128;
    static constexpr bool kSplitQueries = std::is_same_v<T, __half>;
    static constexpr int kCtasPerSm = 512 / kThreads;

    static_assert(kRows * kThreadsOfRow == kThreads && kRowWords == kChunks + 1, "a thread has its part of one row");
    static_assert(kWarps >= 4, "four warps find the rows' places in the pool");
};

template <typename Config>
struct FrameTile {
    // What a thread copies for itself: its chunks of the next row, and (cos, sin) of two pairs each.
    uint4 input[2][Config::kThreads];
    float4 angles[4][Config::kThreads];
    uint4 x[2][Config::kRows * Config::kChunks];  // high and low part
    uint4 out[Config::kRows * Config::kChunks];   // of the activations' type
    uint32_t rows[Config::kRows * Config::kRowWords];
    float2 extremes[Config::kRows][Config::kWarps + 1];
    uint8_t* targets[2][Config::kRows];  // in the pool, or null; of this tile and the last

    // Eight rows of one chunk, which ldmatrix reads at once, lie in eight different groups of banks.
    __device__ static int place(int row, int chunk) {
        return row * Config::kChunks + (chunk ^ (Config::kChunks % 8 == 0 ? row % 8 : row / 2 % 4));
    }
};

struct FrameGrid {
    int group;          // query heads of a KV head
    int tiles_per_run;  // gridDim is (runs of a KV head over the same tokens, num_kv_heads, runs of K)
};

constexpr float kLowFactor = 2048.0f;  // of low parts

// Saturating: what is beyond fp16 has no place in the cache either.
__device__ inline uint32_t pack_half2_saturated(float low, float high) {
    uint32_t pair;
    asm("cvt.rn.satfinite.f16x2.f32 %0, %1, %2;" : "=r"(pair) : "f"(high), "f"(low));
    return pair;
}

__device__ inline void split_pair(float a, float b, uint32_t& high, uint32_t& low) {
    high = pack_half2_saturated(a, b);
    float2 const taken = __half22float2(reinterpret_cast<__half2 const&>(high));
    low = pack_half2_saturated((a - taken.x) * kLowFactor, (b - taken.y) * kLowFactor);
}

template <typename Config>
class FrameKernel {
  public:
    using T = typename Config::Activation;
    using Tile = FrameTile<Config>;

    __device__ FrameKernel(RotateQuantizeKvParams const& params, FrameGrid const& grid, Tile& tile)
        : p(params),
          tile(tile),
          group(grid.group),
          kind(blockIdx.x == 0   ? kKeyRows
               : blockIdx.x == 1 ? kValueRows
                                 : kQueryRows),
          head(blockIdx.y),
          warp(threadIdx.x / 32),
          lane(threadIdx.x % 32),
          row(threadIdx.x / Config::kThreadsOfRow),
          chunk(threadIdx.x % Config::kThreadsOfRow) {}

    __device__ void run(int tiles_per_run);

  private:
    struct Row {
        int token;
        int head;  // of Q, of K or of V; -1: there is no such row
    };
    struct Columns {
        uint4 high[Config::kInRegisters ? Config::kSteps : 1], low[Config::kInRegisters ? Config::kSteps : 1];
    };
    // Where in the pool a lane's token goes; slot -1 is nowhere.
    struct Place {
        int32_t entry;  // of the block table
        int slot;
    };
    using Sums = float[4][4];  // of rows lane / 4 + 8 i, four neighboring channels

    RotateQuantizeKvParams const& p;
    Tile& tile;
    int const group;
    RowKind const kind;
    int const head;  // KV head
    int const warp, lane;
    int const row, chunk;  // of the tile, this thread's

    __device__ bool finds_places() const { return kind != kQueryRows && warp < Config::kRows / 8; }
    __device__ bool splits_x() const { return kind != kQueryRows || Config::kSplitQueries; }
    __device__ bool splits_matrix() const { return kind == kKeyRows || (kind == kQueryRows && Config::kSplitQueries); }
    __device__ int order() const { return kind == kValueRows && p.rotate_v ? p.hadamard_order : 1; }  // of V
    __device__ int num_rows() const { return kind == kQueryRows ? p.num_tokens * group : p.num_tokens; }
    __device__ int num_heads() const { return kind == kQueryRows ? p.num_heads : p.pool.num_kv_heads; }
    __device__ void* out() const { return kind == kQueryRows ? p.q_out : kind == kKeyRows ? p.k_out : p.v_out; }
    __device__ bool stays() const { return kind == kValueRows && !p.rotate_v; }
    __device__ int position_of(Row const& of) const {
        return kind == kValueRows ? 0 : __ldg(p.position_ids + of.token);
    }
    __device__ uint4* out_row(Row const& of) const {
        return static_cast<uint4*>(out()) + (int64_t(of.token) * num_heads() + of.head) * Config::kChunks;
    }

    __device__ uint4 matrix(int part, int step) const;
    __device__ void fetch_matrix(Columns& columns) const;
    __device__ Row row_of(int first_row) const;
    __device__ void copy_row(Row const& of) const;
    __device__ void copy_angles(int position) const;
    __device__ int find_sequence(int first_row) const;
    __device__ Place find_place(int first_row, int sequence) const;
    __device__ void keep_place(Place place, uint8_t** targets) const;
    __device__ void prepare(Row const& of) const;
    __device__ void rope(float (&a)[8], float (&b)[8]) const;
    __device__ void center(float (&a)[8], int chunk) const;
    __device__ void split(float const (&x)[8], int chunk) const;
    __device__ void multiply(Columns const& columns, int rows, Sums& y) const;
    __device__ void quantize(Sums const& y) const;
    __device__ void pack(Sums const& y) const;
    __device__ void store(Row const& of, uint8_t* target) const;
};

// What a lane holds of the matrix for one step.
template <typename Config>
__device__ uint4 FrameKernel<Config>::matrix(int part, int step) const {
    if (kind != kValueRows) {
        auto const* const frame = static_cast<uint4 const*>(kind == kQueryRows ? p.q_frame : p.k_frame);
        return __ldg(frame + (((head * 2 + part) * Config::kWarps + warp) * Config::kSteps + step) * 32 + lane);
    }
    // Signs of the Hadamard matrix, whose norm comes in the end; of order 1 it is the identity. The rows' upper bits
    // are the step, the columns' are the warp.
    uint32_t words[4];
#pragma unroll
    for (int i = 0; i < 4; ++i) {
        uint32_t bits[2];
#pragma unroll
        for (int j = 0; j < 2; ++j) {
            int const k = 8 * (i % 2) + 2 * (lane % 4) + j, n = 4 * (lane / 8) + 2 * (i / 2) + lane / 4 % 2;
            int const signs = __popc(k & n) + __popc(step & warp & (order() / 16 - 1));
            bits[j] = order() == 1 && k != n ? 0 : order() > 1 && signs % 2 ? 0xbc00 : 0x3c00;
        }
        words[i] = bits[1] << 16 | bits[0];
    }
    return {words[0], words[1], words[2], words[3]};
}

template <typename Config>
__device__ void FrameKernel<Config>::fetch_matrix(Columns& columns) const {
    if constexpr (Config::kInRegisters) {
#pragma unroll
        for (int s = 0; s < Config::kSteps; ++s) columns.high[s] = matrix(0, s);
        if (splits_matrix()) {
#pragma unroll
            for (int s = 0; s < Config::kSteps; ++s) columns.low[s] = matrix(1, s);
        }
        __syncwarp();  // or else the compiler puts these loads behind the wait for others
    }
}

template <typename Config>
__device__ auto FrameKernel<Config>::row_of(int first_row) const -> Row {
    int const r = first_row + row;
    if (r >= num_rows()) return {0, -1};
    if (kind != kQueryRows) return {r, head};
    int const token = unsigned(r) / unsigned(group);
    return {token, head * group + r - token * group};
}

// Begin to copy this thread's part of a row.
template <typename Config>
__device__ void FrameKernel<Config>::copy_row(Row const& of) const {
    int const heads = p.num_heads + 2 * p.pool.num_kv_heads;
    int const before = kind == kQueryRows ? 0 : p.num_heads + (kind == kValueRows ? p.pool.num_kv_heads : 0);
    int64_t const first = (int64_t(of.token) * heads + before + max(of.head, 0)) * Config::kChunks + chunk;
    auto const* const chunks = static_cast<uint4 const*>(p.qkv) + first;
#pragma unroll
    for (int i = 0; i < 2; ++i)
        copy_async(shared_address(&tile.input[i][threadIdx.x]), chunks + i * Config::kThreadsOfRow,
                   of.head < 0 ? 0 : 16);
}

template <typename Config>
__device__ void FrameKernel<Config>::copy_angles(int position) const {
    if (kind == kValueRows) return;
    auto const* const line =
        reinterpret_cast<float4 const*>(p.cos_sin) + int64_t(position) * (Config::kHeadDim / 4) + 4 * chunk;
#pragma unroll
    for (int i = 0; i < 4; ++i) copy_async_cached(shared_address(&tile.angles[i][threadIdx.x]), line + i);
}

// Of this lane's token, if the tile is of K or V: eight lanes of each of four warps have one. As many sequences end
// before it.
template <typename Config>
__device__ int FrameKernel<Config>::find_sequence(int first_row) const {
    if (!finds_places()) return p.num_sequences;
    int const first = first_row + 8 * warp;
    int passed[8] = {}, sequence = p.num_sequences;
    for (int i = lane; i < p.num_sequences; i += 32) {
        int const end = __ldg(p.last_token_ids + i);
#pragma unroll
        for (int j = 0; j < 8; ++j) passed[j] += end <= first + j;
    }
#pragma unroll
    for (int j = 0; j < 8; ++j) {
        int const before = __reduce_add_sync(~0u, passed[j]);
        if (lane == j) sequence = before;
    }
    return first + lane < p.num_tokens ? sequence : p.num_sequences;
}

template <typename Config>
__device__ auto FrameKernel<Config>::find_place(int first_row, int sequence) const -> Place {
    if (sequence == p.num_sequences) return {0, -1};
    int const token = first_row + 8 * warp + lane;
    int const slot = __ldg(p.sequence_length + sequence) - (__ldg(p.last_token_ids + sequence) - token);
    if (kind == kKeyRows && p.decode_counters != nullptr) p.decode_counters[sequence * p.pool.num_kv_heads + head] = 0;
    int32_t const* const table = p.pool.table(sequence, kind == kKeyRows ? kKey : kValue);
    return {__ldg(table + p.pool.block_of(slot)), slot};
}

template <typename Config>
__device__ void FrameKernel<Config>::keep_place(Place place, uint8_t** targets) const {
    if (!finds_places() || lane >= 8) return;
    uint8_t* const rows = p.pool.rows(place.entry, head);
    targets[8 * warp + lane] = place.slot < 0 ? nullptr : rows + p.pool.row_of(place.slot) * p.pool.row_bytes;
}

template <typename Config>
__device__ void FrameKernel<Config>::rope(float (&a)[8], float (&b)[8]) const {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
        float4 const two = tile.angles[i][threadIdx.x];
#pragma unroll
        for (int j = 2 * i; j < 2 * i + 2; ++j) {
            float const x = a[j], y = b[j], cos = j % 2 ? two.z : two.x, sin = j % 2 ? two.w : two.y;
            a[j] = x * cos - y * sin;
            b[j] = y * cos + x * sin;
        }
    }
}

template <typename Config>
__device__ void FrameKernel<Config>::center(float (&x)[8], int chunk) const {
    auto const* const line = reinterpret_cast<float4 const*>(p.k_center) + head * (Config::kHeadDim / 4) + 2 * chunk;
#pragma unroll
    for (int i = 0; i < 2; ++i) {
        float4 const c = __ldg(line + i);
        x[4 * i] -= c.x;
        x[4 * i + 1] -= c.y;
        x[4 * i + 2] -= c.z;
        x[4 * i + 3] -= c.w;
    }
}

template <typename Config>
__device__ void FrameKernel<Config>::split(float const (&x)[8], int chunk) const {
    uint4 high, low;
    split_pair(x[0], x[1], high.x, low.x);
    split_pair(x[2], x[3], high.y, low.y);
    split_pair(x[4], x[5], high.z, low.z);
    split_pair(x[6], x[7], high.w, low.w);
    tile.x[0][Tile::place(row, chunk)] = high;
    if (splits_x()) tile.x[1][Tile::place(row, chunk)] = low;
}

// A thread's part of a row, after RoPE and centring, as the operand of the product.
template <typename Config>
__device__ void FrameKernel<Config>::prepare(Row const& of) const {
    uint4 const first = tile.input[0][threadIdx.x], second = tile.input[1][threadIdx.x];
    float a[8], b[8];
    unpack_chunk<T>(first, a);
    unpack_chunk<T>(second, b);
    if (kind != kValueRows) rope(a, b);
    if (kind == kKeyRows && p.k_center != nullptr) {
        center(a, chunk);
        center(b, chunk + Config::kThreadsOfRow);
    }
    split(a, chunk);
    split(b, chunk + Config::kThreadsOfRow);
    if (stays() && of.head >= 0 && out() != nullptr) {
        uint4* const chunks = out_row(of) + chunk;
        chunks[0] = first;
        chunks[Config::kThreadsOfRow] = second;
    }
}

// The warp's 16 columns of the tile's product; the second 16 rows only where there are any.
template <typename Config>
__device__ void FrameKernel<Config>::multiply(Columns const& columns, int rows, Sums& y) const {
    float sums[2][2][4] = {}, rest[2][2][4] = {};
#pragma unroll
    for (int s = 0; s < Config::kSteps; ++s) {
        if (kind == kValueRows && (s ^ warp) * 16 >= order()) continue;  // another block of the Hadamard matrix
        uint4 high, low;
        if constexpr (Config::kInRegisters) {
            high = columns.high[s];
            low = columns.low[s];
        } else {
            high = matrix(0, s);
            if (splits_matrix()) low = matrix(1, s);
        }
#pragma unroll
        for (int m = 0; m < 2; ++m) {
            if (16 * m >= rows) continue;
            int const place = Tile::place(16 * m + lane % 16, 2 * s + lane / 16);
            uint32_t x[4];
            load_matrices(x, tile.x[0] + place);
            mma_16x8x16(sums[m][0], x[0], x[1], x[2], x[3], high.x, high.y);
            mma_16x8x16(sums[m][1], x[0], x[1], x[2], x[3], high.z, high.w);
            if (splits_matrix()) {
                mma_16x8x16(rest[m][0], x[0], x[1], x[2], x[3], low.x, low.y);
                mma_16x8x16(rest[m][1], x[0], x[1], x[2], x[3], low.z, low.w);
            }
            if (splits_x()) {
                load_matrices(x, tile.x[1] + place);
                mma_16x8x16(rest[m][0], x[0], x[1], x[2], x[3], high.x, high.y);
                mma_16x8x16(rest[m][1], x[0], x[1], x[2], x[3], high.z, high.w);
            }
        }
    }
    float const norm = hadamard_norm(order());
#pragma unroll
    for (int r = 0; r < 4; ++r)
#pragma unroll
        for (int i = 0; i < 4; ++i) {
            int const place = 2 * (r % 2) + i % 2;
            y[r][i] = fmaf(rest[r / 2][i / 2][place], 1.0f / kLowFactor, sums[r / 2][i / 2][place]) * norm;
        }
}

// Rows of codes, scale and lo, to shared memory. All warps tell each other their columns' extremes.
template <typename Config>
__device__ void FrameKernel<Config>::quantize(Sums const& y) const {
    float2 mine;
#pragma unroll
    for (int r = 0; r < 4; ++r) {
        float2 ends = {fminf(fminf(y[r][0], y[r][1]), fminf(y[r][2], y[r][3])),
                       fmaxf(fmaxf(y[r][0], y[r][1]), fmaxf(y[r][2], y[r][3]))};
#pragma unroll
        for (int mask = 1; mask < 4; mask *= 2) {
            ends.x = fminf(ends.x, __shfl_xor_sync(~0u, ends.x, mask));
            ends.y = fmaxf(ends.y, __shfl_xor_sync(~0u, ends.y, mask));
        }
        if (r == 0 || lane % 4 == r) mine = ends;
    }
    tile.extremes[8 * (lane % 4) + lane / 4][warp] = mine;
    __syncthreads();
    float2 ends = tile.extremes[lane][0];
#pragma unroll
    for (int w = 1; w < Config::kWarps; ++w) {
        float2 const other = tile.extremes[lane][w];
        ends = {fminf(ends.x, other.x), fmaxf(ends.y, other.y)};
    }
    RowScale const scale = row_scale(ends.x, ends.y, p.range_factor);  // of row lane
    if (warp == 0) tile.rows[lane * Config::kRowWords + Config::kChunks] = scale.tail;
    auto* const codes = reinterpret_cast<uint16_t*>(tile.rows) + 4 * warp + lane % 4;
#pragma unroll
    for (int r = 0; r < 4; ++r) {
        int const of = 8 * r + lane / 4;
        RowScale const its = {__shfl_sync(~0u, scale.lo, of), __shfl_sync(~0u, scale.inverse, of),
                              __shfl_sync(~0u, scale.range, of), 0};
        codes[of * 2 * Config::kRowWords] = uint16_t(quantize_word(y[r], its));
    }
}

// Rows of the activations' type to shared memory.
template <typename Config>
__device__ void FrameKernel<Config>::pack(Sums const& y) const {
#pragma unroll
    for (int r = 0; r < 4; ++r) {
        uint4* const chunk_of_row = tile.out + Tile::place(8 * r + lane / 4, 2 * warp + lane % 4 / 2);
        reinterpret_cast<uint2*>(chunk_of_row)[lane % 2] = {pack_pair<T>(y[r][0], y[r][1]),
                                                            pack_pair<T>(y[r][2], y[r][3])};
    }
}

// A thread's part of a finished row to the tensor that asks for it and to the pool.
template <typename Config>
__device__ void FrameKernel<Config>::store(Row const& of, uint8_t* target) const {
    if (of.head < 0) return;
    if (out() != nullptr && !stays()) {
        uint4* const chunks = out_row(of) + chunk;
        chunks[0] = tile.out[Tile::place(row, chunk)];
        chunks[Config::kThreadsOfRow] = tile.out[Tile::place(row, chunk + Config::kThreadsOfRow)];
    }
    if (kind == kQueryRows || target == nullptr) return;
    auto* const words = reinterpret_cast<uint32_t*>(target);
    uint32_t const* const ours = tile.rows + row * Config::kRowWords;
    words[chunk] = ours[chunk];
    words[chunk + Config::kThreadsOfRow] = ours[chunk + Config::kThreadsOfRow];
    if (chunk == 0) words[Config::kChunks] = ours[Config::kChunks];
}

template <typename Config>
__device__ void FrameKernel<Config>::run(int tiles_per_run) {
    int const of_token = kind == kQueryRows ? blockIdx.z * group + blockIdx.x - 2 : blockIdx.z;
    int first_row = of_token * tiles_per_run * Config::kRows;
    int const end = min(num_rows(), first_row + tiles_per_run * Config::kRows);
    if (first_row >= end) return;
    Columns columns;
    fetch_matrix(columns);
    Row next = row_of(first_row);
    copy_row(next);
    int position = position_of(next);
    // The ways to the slot and to the angles are chains of loads, of which each is begun before what does not need it.
    int sequence = find_sequence(first_row);
    copy_angles(position);
    end_copy_group();
    for (int i = 0; first_row < end; i ^= 1, first_row += Config::kRows) {
        bool const more = first_row + Config::kRows < end;
        Row const now = next;
        if (more) {
            next = row_of(first_row + Config::kRows);
            position = position_of(next);
        }
        Place const place = find_place(first_row, sequence);
        wait_for_copies<0>();
        prepare(now);
        keep_place(place, tile.targets[i]);
        if (more) {
            copy_row(next);
            copy_angles(position);
            end_copy_group();
        }
        __syncthreads();
        Sums y;
        multiply(columns, end - first_row, y);
        if (more) sequence = find_sequence(first_row + Config::kRows);
        if (out() != nullptr && !stays()) pack(y);
        if (kind != kQueryRows) quantize(y);
        __syncthreads();
        store(now, tile.targets[i][row]);
    }
}

template <typename Config>
__global__ void __launch_bounds__(Config::kThreads, Config::kCtasPerSm)
    frame_kernel(__grid_constant__ RotateQuantizeKvParams const params, __grid_constant__ FrameGrid const grid) {
    extern __shared__ uint4 memory[];
    FrameKernel<Config>(params, grid, *reinterpret_cast<FrameTile<Config>*>(memory)).run(grid.tiles_per_run);
}

}  // namespace saw
