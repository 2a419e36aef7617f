// The write with frames (frame.cuh) of few tokens, and of all where frame_many_sm90.cuh does not go.
//
// A tile is 32 rows. A thread takes a chunk of eight channels of a row's first half and the one of its second half, so
// both channels of each RoPE pair, and leaves them in shared memory as the operand of the tensor cores. A warp
// multiplies the tile by 16 columns of the matrix, which its registers hold: they are fetched before anything that
// depends on what is read of the step.
#pragma once

#include "saw/rotate_quantize_kv/frame.cuh"

namespace saw {

template <int HeadDim, typename T, int KeyBits = 4>
struct FrameFewConfig {
    static constexpr int kKeyBits = KeyBits;
    static constexpr int kHeadDim = HeadDim;
    using Activation = T;

    static constexpr int kRows = 32;  // of a tile
    static constexpr int kWarps = HeadDim / 16;
    static constexpr int kThreads = 32 * kWarps;
    static constexpr int kChunks = HeadDim / 8;  // of a row
    static constexpr int kThreadsOfRow = kChunks / 2;
    static constexpr int kRowWords = kChunks * KeyBits / 4 + 1;  // of the longest row in the pool
    // The matrix of head_dim 256 is more than the registers of a CTA.
    static constexpr bool kInRegisters = HeadDim <= 128;
    static constexpr int kCtasPerSm = 512 / kThreads;

    static_assert(kRows * kThreadsOfRow == kThreads, "a thread has its part of one row");
    static_assert(kWarps >= kRows / 8, "a warp finds the places of eight rows");
};

template <typename Config>
struct FrameFewTile {
    // What a thread copies for itself: its chunks of the next row, and (cos, sin) of two pairs each.
    uint4 input[2][Config::kThreads];
    float4 angles[4][Config::kThreads];
    uint4 x[2][Config::kRows * Config::kChunks];  // high and low part
    uint4 out[Config::kRows * Config::kChunks];   // of the activations' type
    uint32_t rows[Config::kRows * Config::kRowWords];
    float2 extremes[Config::kRows][Config::kWarps + 1];
    uint8_t* targets[2][Config::kRows];  // in the pool, or null; of this tile and the last
};

template <typename Config, RowKind Kind>
class FrameFewKernel : FrameRows<Config::kHeadDim, typename Config::Activation, Kind, Config::kKeyBits> {
    using T = typename Config::Activation;
    using Rows = FrameRows<Config::kHeadDim, T, Kind, Config::kKeyBits>;
    using Rows::kBits;
    using Rows::kCodeWords;
    using Rows::kRowWords;
    using Rows::kSplitMatrix;
    using Rows::kSplitX;
    using Rows::kSteps;
    using Rows::p;
    using typename Rows::Place;
    using typename Rows::Row;
    using Tile = FrameFewTile<Config>;

  public:
    __device__ FrameFewKernel(RotateQuantizeKvParams const& params, FrameGrid const& grid, Tile& tile)
        : Rows(params, grid),
          tile(tile),
          warp(threadIdx.x / 32),
          lane(threadIdx.x % 32),
          row(threadIdx.x / Config::kThreadsOfRow),
          chunk(threadIdx.x % Config::kThreadsOfRow) {}

    __device__ void run();

  private:
    struct Columns {
        uint4 parts[kSplitMatrix ? 2 : 1][Config::kInRegisters ? kSteps : 1];
    };
    using Sums = float[4][4];  // of rows lane / 4 + 8 i, four neighboring channels

    Tile& tile;
    int const warp, lane;
    int const row, chunk;  // of the tile, this thread's

    __device__ bool finds_places() const { return Kind != kQueryRows && warp < Config::kRows / 8; }
    __device__ void fetch_matrix(Columns& columns) const;
    __device__ int first_end() const;
    __device__ int find_sequence(int first_row, int end) const;
    __device__ void copy_row(Row const& of) const;
    __device__ void copy_angles(int position) const;
    __device__ void prepare(Row const& of) const;
    __device__ void rope(float (&a)[8], float (&b)[8]) const;
    __device__ void center(float (&x)[8], int chunk) const;
    __device__ void split(float const (&x)[8], int chunk) const;
    __device__ void multiply(Columns const& columns, int rows, Sums& y) const;
    __device__ void pack(Sums const& y) const;
    __device__ void quantize(Sums const& y) const;
    __device__ void store(Row const& of, uint8_t* target) const;
};

template <typename Config, RowKind Kind>
__device__ void FrameFewKernel<Config, Kind>::fetch_matrix(Columns& columns) const {
    if constexpr (Config::kInRegisters) {
#pragma unroll
        for (int part = 0; part < (kSplitMatrix ? 2 : 1); ++part)
#pragma unroll
            for (int s = 0; s < kSteps; ++s) columns.parts[part][s] = this->matrix(part, warp, s, lane);
        __syncwarp();  // or else the compiler puts these loads after the wait for others
    }
}

// The end of the lane's first sequence.
template <typename Config, RowKind Kind>
__device__ int FrameFewKernel<Config, Kind>::first_end() const {
    return finds_places() && lane < p.num_sequences ? __ldg(p.last_token_ids + lane) : 0x7fffffff;
}

// Of this lane's token, if the tile is of K or V: eight lanes of each of four warps have one. As many sequences end
// before it.
template <typename Config, RowKind Kind>
__device__ int FrameFewKernel<Config, Kind>::find_sequence(int first_row, int end) const {
    if (!finds_places()) return p.num_sequences;
    int const first = first_row + 8 * warp;
    int passed[8] = {}, sequence = p.num_sequences;
    for (int i = lane;;) {
#pragma unroll
        for (int j = 0; j < 8; ++j) passed[j] += end <= first + j;
        i += 32;
        if (i >= p.num_sequences) break;
        end = __ldg(p.last_token_ids + i);
    }
#pragma unroll
    for (int j = 0; j < 8; ++j) {
        int const before = __reduce_add_sync(~0u, passed[j]);
        if (lane == j) sequence = before;
    }
    return sequence;
}

// Begin to copy this thread's part of a row.
template <typename Config, RowKind Kind>
__device__ void FrameFewKernel<Config, Kind>::copy_row(Row const& of) const {
    uint4 const* const chunks = this->source(of) + chunk;
#pragma unroll
    for (int i = 0; i < 2; ++i)
        copy_async(shared_address(&tile.input[i][threadIdx.x]), chunks + i * Config::kThreadsOfRow,
                   of.head < 0 ? 0 : 16);
}

template <typename Config, RowKind Kind>
__device__ void FrameFewKernel<Config, Kind>::copy_angles(int position) const {
    if constexpr (Kind != kValueRows) {
        float4 const* const line = this->angles(position) + 4 * chunk;
#pragma unroll
        for (int i = 0; i < 4; ++i) copy_async_cached(shared_address(&tile.angles[i][threadIdx.x]), line + i);
    }
}

template <typename Config, RowKind Kind>
__device__ void FrameFewKernel<Config, Kind>::rope(float (&a)[8], float (&b)[8]) const {
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

template <typename Config, RowKind Kind>
__device__ void FrameFewKernel<Config, Kind>::center(float (&x)[8], int chunk) const {
    auto const* const line =
        reinterpret_cast<float4 const*>(p.k_center) + this->head * (Config::kHeadDim / 4) + 2 * chunk;
#pragma unroll
    for (int i = 0; i < 2; ++i) {
        float4 const c = __ldg(line + i);
        x[4 * i] -= c.x;
        x[4 * i + 1] -= c.y;
        x[4 * i + 2] -= c.z;
        x[4 * i + 3] -= c.w;
    }
}

template <typename Config, RowKind Kind>
__device__ void FrameFewKernel<Config, Kind>::split(float const (&x)[8], int chunk) const {
    uint4 const high = {high_pair(x[0], x[1]), high_pair(x[2], x[3]), high_pair(x[4], x[5]), high_pair(x[6], x[7])};
    tile.x[0][Rows::place(row, chunk)] = high;
    if constexpr (kSplitX)
        tile.x[1][Rows::place(row, chunk)] = {low_pair(x[0], x[1], high.x), low_pair(x[2], x[3], high.y),
                                              low_pair(x[4], x[5], high.z), low_pair(x[6], x[7], high.w)};
}

// A thread's part of a row, after RoPE and centring, as the operand of the product.
template <typename Config, RowKind Kind>
__device__ void FrameFewKernel<Config, Kind>::prepare(Row const& of) const {
    uint4 const first = tile.input[0][threadIdx.x], second = tile.input[1][threadIdx.x];
    float a[8], b[8];
    unpack_chunk<T>(first, a);
    unpack_chunk<T>(second, b);
    if constexpr (Kind != kValueRows) rope(a, b);
    if (Kind == kKeyRows && p.k_center != nullptr) {
        center(a, chunk);
        center(b, chunk + Config::kThreadsOfRow);
    }
    split(a, chunk);
    split(b, chunk + Config::kThreadsOfRow);
    if (this->stays() && of.head >= 0 && this->out() != nullptr) {
        uint4* const chunks = this->target(of) + chunk;
        chunks[0] = first;
        chunks[Config::kThreadsOfRow] = second;
    }
}

// The warp's 16 columns of the tile's product; the second 16 rows only where there are any.
template <typename Config, RowKind Kind>
__device__ void FrameFewKernel<Config, Kind>::multiply(Columns const& columns, int rows, Sums& y) const {
    float const norm = hadamard_norm(this->order());
#pragma unroll
    for (int m = 0; m < 2; ++m) {
        if (16 * m >= rows) break;
        float sums[2][4] = {}, rest[2][2][4] = {};
#pragma unroll(Config::kInRegisters ? kSteps : 2)
        for (int s = 0; s < kSteps; ++s) {
            if (Kind == kValueRows && (s ^ warp) * 16 >= this->order()) continue;  // another block of the matrix
            uint4 parts[2];
#pragma unroll
            for (int i = 0; i < (kSplitMatrix ? 2 : 1); ++i)
                parts[i] = Config::kInRegisters ? columns.parts[i][s] : this->matrix(i, warp, s, lane);
            int const place = Rows::place(16 * m + lane % 16, 2 * s + lane / 16);
            uint32_t x[4];
            load_matrices(x, tile.x[0] + place);
            mma_16x8x16(sums[0], x[0], x[1], x[2], x[3], parts[0].x, parts[0].y);
            mma_16x8x16(sums[1], x[0], x[1], x[2], x[3], parts[0].z, parts[0].w);
            if constexpr (kSplitMatrix) {
                mma_16x8x16(rest[0][0], x[0], x[1], x[2], x[3], parts[1].x, parts[1].y);
                mma_16x8x16(rest[0][1], x[0], x[1], x[2], x[3], parts[1].z, parts[1].w);
            }
            if constexpr (kSplitX) {
                load_matrices(x, tile.x[1] + place);
                mma_16x8x16(rest[1][0], x[0], x[1], x[2], x[3], parts[0].x, parts[0].y);
                mma_16x8x16(rest[1][1], x[0], x[1], x[2], x[3], parts[0].z, parts[0].w);
            }
        }
#pragma unroll
        for (int j = 0; j < 2; ++j)
#pragma unroll
            for (int i = 0; i < 4; ++i)
                y[2 * m + i / 2][2 * j + i % 2] =
                    fmaf(rest[0][j][i] + rest[1][j][i], 1.0f / kLowFactor, sums[j][i]) * norm;
    }
}

// Rows of codes, scale and lo, to shared memory. All warps tell each other their columns' extremes.
template <typename Config, RowKind Kind>
__device__ void FrameFewKernel<Config, Kind>::quantize(Sums const& y) const {
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
    RowScale const scale = this->scale_of(ends.x, ends.y);  // of row lane
    if (warp == 0) tile.rows[lane * kRowWords + kCodeWords] = scale.tail;
    // Four codes of a row.
    using Four = std::conditional_t<kBits == 4, uint16_t, uint32_t>;
    auto* const codes = reinterpret_cast<Four*>(tile.rows) + 4 * warp + lane % 4;
#pragma unroll
    for (int r = 0; r < 4; ++r) {
        int const of = 8 * r + lane / 4;
        RowScale const its = {__shfl_sync(~0u, scale.lo, of), __shfl_sync(~0u, scale.inverse, of),
                              __shfl_sync(~0u, scale.range, of), 0};
        codes[of * (sizeof(uint32_t) / sizeof(Four)) * kRowWords] = Four(quantize_word<kBits>(y[r], its));
    }
}

// Rows of the activations' type to shared memory.
template <typename Config, RowKind Kind>
__device__ void FrameFewKernel<Config, Kind>::pack(Sums const& y) const {
#pragma unroll
    for (int r = 0; r < 4; ++r) {
        uint4* const chunk_of_row = tile.out + Rows::place(8 * r + lane / 4, 2 * warp + lane % 4 / 2);
        reinterpret_cast<uint2*>(chunk_of_row)[lane % 2] = {pack_pair<T>(y[r][0], y[r][1]),
                                                            pack_pair<T>(y[r][2], y[r][3])};
    }
}

// A thread's part of a finished row to the tensor that asks for it and to the pool.
template <typename Config, RowKind Kind>
__device__ void FrameFewKernel<Config, Kind>::store(Row const& of, uint8_t* target) const {
    if (of.head < 0) return;
    if (this->out() != nullptr && !this->stays()) {
        uint4* const chunks = this->target(of) + chunk;
        chunks[0] = tile.out[Rows::place(row, chunk)];
        chunks[Config::kThreadsOfRow] = tile.out[Rows::place(row, chunk + Config::kThreadsOfRow)];
    }
    if (Kind == kQueryRows || target == nullptr) return;
    auto* const words = reinterpret_cast<uint32_t*>(target);
    uint32_t const* const ours = tile.rows + row * kRowWords;
#pragma unroll
    for (int i = 0; i < kCodeWords; i += Config::kThreadsOfRow) words[chunk + i] = ours[chunk + i];
    if (chunk == 0) words[kCodeWords] = ours[kCodeWords];
}

template <typename Config, RowKind Kind>
__device__ void FrameFewKernel<Config, Kind>::run() {
    if (this->begin >= this->end) return;
    // The ways to the slot and to the angles are chains of loads, of which each is begun before what does not need it.
    Row next = this->row_at(this->begin + row);
    int position = this->position(next);
    int first_sequence_end = first_end();
    copy_row(next);
    __syncwarp();
    Columns columns;
    fetch_matrix(columns);
    int sequence = find_sequence(this->begin, first_sequence_end);
    copy_angles(position);
    end_copy_group();
    for (int first = this->begin, i = 0; first < this->end; first += Config::kRows, i ^= 1) {
        bool const more = first + Config::kRows < this->end;
        Row const now = next;
        if (more) {
            next = this->row_at(first + Config::kRows + row);
            position = this->position(next);
            first_sequence_end = first_end();
        }
        Place const place = this->find_place(first + 8 * warp + lane, lane < 8 ? sequence : p.num_sequences);
        wait_for_copies<0>();
        prepare(now);
        if (finds_places() && lane < 8) tile.targets[i][8 * warp + lane] = this->pool_row(place);
        if (more) {
            copy_row(next);
            copy_angles(position);
            end_copy_group();
        }
        __syncthreads();
        Sums y = {};
        multiply(columns, this->end - first, y);
        if (more) sequence = find_sequence(first + Config::kRows, first_sequence_end);
        if (this->out() != nullptr && !this->stays()) pack(y);
        if constexpr (Kind != kQueryRows) quantize(y);
        __syncthreads();
        store(now, tile.targets[i][row]);
    }
}

template <typename Config>
__global__ void __launch_bounds__(Config::kThreads, Config::kCtasPerSm)
    frame_few_kernel(__grid_constant__ RotateQuantizeKvParams const params, __grid_constant__ FrameGrid const grid) {
    wait_for_last_grid();
    allow_next_grid();
    extern __shared__ __align__(1024) uint8_t memory[];
    auto& tile = *reinterpret_cast<FrameFewTile<Config>*>(memory);
    if (blockIdx.x == 0) {
        FrameFewKernel<Config, kKeyRows>(params, grid, tile).run();
    } else if (blockIdx.x == 1) {
        FrameFewKernel<Config, kValueRows>(params, grid, tile).run();
    } else {
        FrameFewKernel<Config, kQueryRows>(params, grid, tile).run();
    }
}

}  // namespace saw
