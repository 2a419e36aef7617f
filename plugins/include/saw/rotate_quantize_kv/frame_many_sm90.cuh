// The write with frames (frame.cuh) of many tokens, on Hopper's tensor cores.
//
// A warp works on tile after tile of 16 rows on its own, but that four warps share a wgmma: rows, angles and results
// are in its registers, where a lane has both channels of each RoPE pair, and the matrix is in shared memory. While it
// works on a tile, the next one's rows are on their way to its own shared memory, and results leave through that, so
// that every line of global memory is read and written whole.
#pragma once

#include "saw/common/sm90.cuh"
#include "saw/rotate_quantize_kv/frame.cuh"

namespace saw {

template <int HeadDim, typename T, int KeyBits = 4>
struct FrameManyConfig {
    static constexpr int kKeyBits = KeyBits;
    static constexpr int kHeadDim = HeadDim;
    using Activation = T;

    static constexpr int kRows = 16;  // of a warp's tile
    static constexpr int kWarps = 12;
    static constexpr int kThreads = 32 * kWarps;
    static constexpr int kCtaRows = kRows * kWarps;
    static constexpr int kChunks = HeadDim / 8;         // of a row
    static constexpr int kBoxes = (HeadDim + 63) / 64;  // of 64 columns of the matrix, 128 bytes a row
    static constexpr int kBoxBytes = HeadDim * 128;

    static_assert(HeadDim % 32 == 0 && HeadDim <= 128, "sums of more columns are more than the registers of a thread");
};

template <typename Config>
struct FrameManyShared {
    alignas(1024) uint8_t matrix[2][Config::kBoxes * Config::kBoxBytes];  // high and low part
    struct {
        uint4 in[Config::kRows * Config::kChunks];
        uint4 out[Config::kRows * Config::kChunks];
    } warps[Config::kWarps];
};

template <typename Config, RowKind Kind>
class FrameManyKernel : FrameRows<Config::kHeadDim, typename Config::Activation, Kind, Config::kKeyBits> {
    using T = typename Config::Activation;
    using Rows = FrameRows<Config::kHeadDim, T, Kind, Config::kKeyBits>;
    using Rows::kBits;
    using Rows::kCodeWords;
    using Rows::kRowWords;
    using Rows::kSplitMatrix;
    using Rows::kSplitX;
    using Rows::kSteps;
    using Rows::p;
    using typename Rows::Row;
    using Shared = FrameManyShared<Config>;
    static constexpr int kHeadDim = Config::kHeadDim, kChunks = Config::kChunks;

  public:
    __device__ FrameManyKernel(RotateQuantizeKvParams const& params, FrameGrid const& grid, Shared& shared)
        : Rows(params, grid),
          shared(shared),
          in(shared.warps[threadIdx.x / 32].in),
          out_rows(shared.warps[threadIdx.x / 32].out),
          warp(threadIdx.x / 32),
          lane(threadIdx.x % 32) {}

    __device__ void run();

  private:
    // Operands of the products as ldmatrix leaves them, and sums: rows lane / 4 and lane / 4 + 8 of the tile.
    using Operand = uint32_t[4 * kSteps];
    using Sums = float[kHeadDim / 2];
    using Chunks = float[2][kHeadDim / 32][8];  // of both rows: chunks 4 s + lane % 4

    Shared& shared;
    uint4* const in;
    uint4* const out_rows;
    int const warp, lane;

    __device__ void fill_matrix() const;
    __device__ void copy_rows(Row const& row) const;
    __device__ void split(int position, Operand& high, Operand& low) const;
    __device__ void multiply(Operand& high, Operand& low, Sums& sums) const;
    __device__ void take_sums(Sums const& sums, Chunks& y) const;
    __device__ void take_rows(Chunks& y) const;
    __device__ uint8_t* find_target(int first, Row const& row) const;
    __device__ void write(Row const& row, uint4 const* rows) const;
    __device__ void pack(Chunks const& y) const;
    __device__ void quantize(Chunks const& y, uint8_t* target) const;
};

// The frame into boxes of 64 columns, as wgmma takes an operand whose rows are the reduction index. Of a chunk of eight
// columns c, the pair (4 (i / 2) + i % 2, the one two after it) is in the i-th of four blocks of eight sums, where the
// lane has them that has the chunk: number 32 (c / 4) + 8 i + 2 (c % 4).
template <typename Config, RowKind Kind>
__device__ void FrameManyKernel<Config, Kind>::fill_matrix() const {
    constexpr int kPieces = kSteps * kSteps * 32;
#pragma unroll
    for (int part = 0; part < (kSplitMatrix ? 2 : 1); ++part)
#pragma unroll 4
        for (int i = threadIdx.x; i < kPieces; i += Config::kThreads) {
            int const step = i / 32 % kSteps, block = i / 32 / kSteps, g = lane / 4, t = lane % 4;
            uint4 const piece = this->matrix(part, block, step, lane);
            int const c = 2 * block + g / 4, n = 32 * (c / 4) + 8 * (2 * (g / 2 % 2) + g % 2) + 2 * (c % 4);
            uint32_t const words[2][2] = {{piece.x, piece.y}, {piece.z, piece.w}};
            uint8_t* const box = shared.matrix[part] + n / 64 * Config::kBoxBytes;
#pragma unroll
            for (int j = 0; j < 4; ++j) {
                int const k = 16 * step + 8 * (j / 2) + 2 * t + j % 2;
                uint32_t const pair = __byte_perm(words[0][j / 2], words[1][j / 2], j % 2 ? 0x7632 : 0x5410);
                int const place = k * 128 + ((n % 64 / 8 ^ k % 8) * 16) + n % 8 * 2;
                *reinterpret_cast<uint32_t*>(box + place) = pair;
            }
        }
}

// Begin to copy the tile's rows, of which each lane knows one.
template <typename Config, RowKind Kind>
__device__ void FrameManyKernel<Config, Kind>::copy_rows(Row const& row) const {
    auto const mine = reinterpret_cast<unsigned long long>(this->source(row));
    unsigned const exist = __ballot_sync(~0u, row.head >= 0);
#pragma unroll
    for (int j = 0; j < kChunks / 2; ++j) {
        int const of = (32 * j + lane) / kChunks, chunk = (32 * j + lane) % kChunks;
        auto const* const chunks = reinterpret_cast<uint4 const*>(__shfl_sync(~0u, mine, of));
        copy_async(shared_address(in + Rows::place(of, chunk)), chunks + chunk, exist >> of & 1 ? 16 : 0);
    }
}

// The tile's rows after RoPE and centring, in two parts. A lane's word w of a step is of row lane / 4 + 8 (w % 2) and
// channels 16 step + 8 (w / 2) + 2 (lane % 4) and the next.
template <typename Config, RowKind Kind>
__device__ void FrameManyKernel<Config, Kind>::split(int position, Operand& high, Operand& low) const {
    int const t = lane % 4;
    float4 const* angles[2];
    if constexpr (Kind != kValueRows) {
#pragma unroll
        for (int h = 0; h < 2; ++h) angles[h] = this->angles(__shfl_sync(~0u, position, lane / 4 + 8 * h)) + t;
    }
    auto const* const centers =
        Kind == kKeyRows ? reinterpret_cast<float2 const*>(p.k_center) + this->head * (kHeadDim / 2) + t : nullptr;
#pragma unroll
    for (int s = 0; s < kSteps / 2; ++s) {
        constexpr int kOther = kSteps / 2;
#pragma unroll
        for (int w = 0; w < 4; ++w) {
            int const i = 4 * s + w, j = 4 * (s + kOther) + w, pair = 8 * s + 4 * (w / 2);
            float2 a = unpack_pair<T>(high[i]), b = unpack_pair<T>(high[j]);
            if constexpr (Kind != kValueRows) {
                float4 const two = __ldg(angles[w % 2] + pair);  // (cos, sin) of two pairs
                float2 const x = a, y = b;
                a = {x.x * two.x - y.x * two.y, x.y * two.z - y.y * two.w};
                b = {y.x * two.x + x.x * two.y, y.y * two.z + x.y * two.w};
            }
            if (Kind == kKeyRows && p.k_center != nullptr) {
                float2 const first = __ldg(centers + pair), second = __ldg(centers + pair + kHeadDim / 4);
                a = {a.x - first.x, a.y - first.y};
                b = {b.x - second.x, b.y - second.y};
            }
            high[i] = high_pair(a.x, a.y);
            high[j] = high_pair(b.x, b.y);
            if constexpr (kSplitX) {
                low[i] = low_pair(a.x, a.y, high[i]);
                low[j] = low_pair(b.x, b.y, high[j]);
            }
        }
    }
}

template <typename Config, RowKind Kind>
__device__ void FrameManyKernel<Config, Kind>::multiply(Operand& high, Operand& low, Sums& sums) const {
    auto const add = [&](Operand const& x, int part, bool accumulate) {
#pragma unroll
        for (int s = 0; s < kSteps; ++s) {
            uint32_t const rows = shared_address(shared.matrix[part]) + s * 16 * 128;
            Wgmma<__half, kHeadDim>::registers(sums, x + 4 * s, swizzled_operand(rows, 1024, Config::kBoxBytes),
                                               accumulate || s > 0);
        }
    };
    wgmma_fence();
    if constexpr (kSplitX) {
        add(low, 0, false);
        if constexpr (kSplitMatrix) add(high, 1, true);
        wgmma_commit();
        wgmma_wait<0>();
        hold(sums);
#pragma unroll
        for (float& sum : sums) sum *= 1.0f / kLowFactor;
        hold(sums);
        wgmma_fence();
    }
    add(high, 0, kSplitX);
    wgmma_commit();
    wgmma_wait<0>();
    hold(sums);
    hold(high);  // operands stay what they are until the products are done
    if constexpr (kSplitX) hold(low);
}

template <typename Config, RowKind Kind>
__device__ void FrameManyKernel<Config, Kind>::take_sums(Sums const& sums, Chunks& y) const {
    float const norm = hadamard_norm(this->order());
#pragma unroll
    for (int h = 0; h < 2; ++h)
#pragma unroll
        for (int s = 0; s < kHeadDim / 32; ++s)
#pragma unroll
            for (int i = 0; i < 8; ++i) {
                float const sum = sums[4 * (4 * s + i / 2) + 2 * h + i % 2];
                y[h][s][4 * (i / 4) + i / 2 % 2 + 2 * (i % 2)] = Kind == kValueRows ? sum * norm : sum;
            }
}

// Rows that are multiplied by nothing.
template <typename Config, RowKind Kind>
__device__ void FrameManyKernel<Config, Kind>::take_rows(Chunks& y) const {
#pragma unroll
    for (int h = 0; h < 2; ++h)
#pragma unroll
        for (int s = 0; s < kHeadDim / 32; ++s)
            unpack_chunk<T>(in[Rows::place(lane / 4 + 8 * h, 4 * s + lane % 4)], y[h][s]);
}

// Where in the pool the lane's row goes, or null. Most tiles are of one sequence.
template <typename Config, RowKind Kind>
__device__ uint8_t* FrameManyKernel<Config, Kind>::find_target(int first, Row const& row) const {
    int sequence = find_sequence(p.last_token_ids, p.num_sequences, first);
    if (sequence != find_sequence(p.last_token_ids, p.num_sequences, first + Config::kRows - 1))
        for (int i = 1; i < Config::kRows; ++i) {
            int const other = find_sequence(p.last_token_ids, p.num_sequences, first + i);
            if (lane % Config::kRows == i) sequence = other;
        }
    return row.head < 0 ? nullptr : this->pool_row(this->find_place(row.token, sequence));
}

// Whole rows from shared memory to the tensor that asks for them.
template <typename Config, RowKind Kind>
__device__ void FrameManyKernel<Config, Kind>::write(Row const& row, uint4 const* rows) const {
    auto const mine = reinterpret_cast<unsigned long long>(this->target(row));
    unsigned const exist = __ballot_sync(~0u, row.head >= 0);
#pragma unroll
    for (int j = 0; j < kChunks / 2; ++j) {
        int const of = (32 * j + lane) / kChunks, chunk = (32 * j + lane) % kChunks;
        auto* const chunks = reinterpret_cast<uint4*>(__shfl_sync(~0u, mine, of));
        store_if(exist >> of & 1, chunks + chunk, rows[Rows::place(of, chunk)]);
    }
}

template <typename Config, RowKind Kind>
__device__ void FrameManyKernel<Config, Kind>::pack(Chunks const& y) const {
#pragma unroll
    for (int h = 0; h < 2; ++h)
#pragma unroll
        for (int s = 0; s < kHeadDim / 32; ++s)
            out_rows[Rows::place(lane / 4 + 8 * h, 4 * s + lane % 4)] = pack_chunk<T>(y[h][s]);
}

template <typename Config, RowKind Kind>
__device__ void FrameManyKernel<Config, Kind>::quantize(Chunks const& y, uint8_t* target) const {
    auto* const words = reinterpret_cast<uint32_t*>(out_rows);
#pragma unroll
    for (int h = 0; h < 2; ++h) {
        float lowest = y[h][0][0], highest = y[h][0][0];
#pragma unroll
        for (int s = 0; s < kHeadDim / 32; ++s)
#pragma unroll
            for (int i = 0; i < 8; ++i) {
                lowest = fminf(lowest, y[h][s][i]);
                highest = fmaxf(highest, y[h][s][i]);
            }
#pragma unroll
        for (int mask = 1; mask < 4; mask *= 2) {
            lowest = fminf(lowest, __shfl_xor_sync(~0u, lowest, mask));
            highest = fmaxf(highest, __shfl_xor_sync(~0u, highest, mask));
        }
        RowScale const scale = this->scale_of(lowest, highest);
        uint32_t* const row = words + (lane / 4 + 8 * h) * kRowWords;
#pragma unroll
        for (int s = 0; s < kHeadDim / 32; ++s)
#pragma unroll
            for (int i = 0; i < Rows::kWordsOfChunk; ++i)
                row[(4 * s + lane % 4) * Rows::kWordsOfChunk + i] = quantize_word<kBits>(y[h][s], scale, 4 * i);
        if (lane % 4 == 0) row[kCodeWords] = scale.tail;
    }
    __syncwarp();
    auto const mine = reinterpret_cast<unsigned long long>(target);
#pragma unroll
    for (int i = lane; i < (Config::kRows * kRowWords + 31) / 32 * 32; i += 32) {
        int const of = i / kRowWords, word = i % kRowWords;
        auto* const row = reinterpret_cast<uint32_t*>(__shfl_sync(~0u, mine, of));
        if (of < Config::kRows && row != nullptr) row[word] = words[i];
    }
}

template <typename Config, RowKind Kind>
__device__ void FrameManyKernel<Config, Kind>::run() {
    if (this->begin >= this->end) return;
    // All warps of a warpgroup go on as long as one has rows.
    int first_of_four = this->begin + warp / 4 * 4 * Config::kRows;
    auto const first = [&] { return first_of_four + warp % 4 * Config::kRows; };
    Row next = this->row_at(first() + lane % Config::kRows);
    copy_rows(next);
    end_copy_group();
    int next_position = this->position(next);
    if (!this->stays()) {
        fill_matrix();
        fence_bulk_copy();
        __syncthreads();
    }
    for (; first_of_four < this->end; first_of_four += Config::kCtaRows) {
        Row const row = next;
        int const position = next_position;
        wait_for_copies<0>();
        __syncwarp();
        Operand high, low;
        Chunks y;
        if (this->stays()) {
            take_rows(y);
            if (this->out() != nullptr) write(row, in);
        } else {
#pragma unroll
            for (int s = 0; s < kSteps; ++s) {
                uint32_t x[4];
                load_matrices(x, in + Rows::place(lane % 16, 2 * s + lane / 16));
#pragma unroll
                for (int i = 0; i < 4; ++i) high[4 * s + i] = x[i];
            }
        }
        __syncwarp();
        int const here = first();
        next = this->row_at(here + Config::kCtaRows + lane % Config::kRows);
        copy_rows(next);
        end_copy_group();
        next_position = this->position(next);
        if (!this->stays()) {
            Sums sums;
            split(position, high, low);
            multiply(high, low, sums);
            take_sums(sums, y);
            if (this->out() != nullptr) {
                pack(y);
                __syncwarp();
                write(row, out_rows);
                __syncwarp();
            }
        }
        if constexpr (Kind != kQueryRows) {
            quantize(y, find_target(here, row));
            __syncwarp();
        }
    }
}

// Where it is not compiled for Hopper it does nothing, and says so by the threads that it takes: frame_few.cuh then
// does its work.
template <typename Config>
__global__ void __launch_bounds__(kHopper ? Config::kThreads : 32, 1)
    frame_many_kernel(__grid_constant__ RotateQuantizeKvParams const params, __grid_constant__ FrameGrid const grid) {
    if constexpr (kHopper) {
        wait_for_last_grid();
        allow_next_grid();
        extern __shared__ __align__(1024) uint8_t memory[];
        auto& shared = *reinterpret_cast<FrameManyShared<Config>*>(memory);
        if (blockIdx.x == 0) {
            FrameManyKernel<Config, kKeyRows>(params, grid, shared).run();
        } else if (blockIdx.x == 1) {
            FrameManyKernel<Config, kValueRows>(params, grid, shared).run();
        } else {
            FrameManyKernel<Config, kQueryRows>(params, grid, shared).run();
        }
    }
}

}  // namespace saw
