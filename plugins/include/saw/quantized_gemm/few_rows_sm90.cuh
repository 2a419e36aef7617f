// The kernel of quantized_gemm() on Hopper: few rows times a weight, near the speed at which the weight is read.
//
// The weight is the tensor cores' operand A and activations are B, so that few of them are in vain. A CTA has blocks of
// the weight's rows and a part of its chunks. One warp copies both operands ahead to shared memory, the weight from one
// piece of memory; warpgroups unpack the weight to registers and multiply what they have unpacked before. CTAs that
// share rows of the weight are a cluster, and add their sums through each other's shared memory, always in one order.
#pragma once

#include "saw/common/sm90.cuh"
#include "saw/quantized_gemm/weights.cuh"

namespace saw {

// Blocks blocks of the weight, with a warpgroup each, times Columns rows of activations.
template <int Blocks_, int Columns_, int Stages_, int Ctas_>
struct FewRowsTile {
    static constexpr int Blocks = Blocks_, Columns = Columns_, Stages = Stages_;
    static constexpr int Ctas = Ctas_;  // on an SM
    static constexpr int Rows = kBlockRows * Blocks, Threads = 128 * (Blocks + 1);
};

// A CTA's shared memory: stages, each a chunk of activations in two boxes, of the weight, and of its scales.
template <typename Tile, WeightType W, int Group>
struct FewRowsShared {
    static constexpr int kBoxBytes = Tile::Columns * 128;  // 64 inputs, swizzled
    static constexpr int kBlockBytes = WeightLayout<W>::kBlockBytes;
    static constexpr int kScaleBytes = WeightLayout<W>::template kScaleBytes<Group>;
    static constexpr int kValues = 2 * kBoxBytes, kScales = kValues + Tile::Blocks * kBlockBytes;
    static constexpr int kStageBytes = (kScales + Tile::Blocks * kScaleBytes + 1023) / 1024 * 1024;
    static constexpr int kStages = Tile::Stages * kStageBytes;
    // In the stages' place when they are done: columns of sums, 4 numbers apart.
    static constexpr int kSumStride = Tile::Rows + 4, kSums = Tile::Columns * kSumStride * 4;
    static constexpr int kBarriers = kStages > kSums ? kStages : kSums;
    static constexpr int kBytes = kBarriers + Tile::Stages * 16 + 1024;  // to begin on a multiple of 1024

    uint8_t* base;

    __device__ explicit FewRowsShared(uint8_t* raw) : base(raw + (1024 - shared_address(raw) % 1024) % 1024) {}
    __device__ uint8_t* stage(int i) const { return base + i % Tile::Stages * kStageBytes; }
    __device__ uint64_t* full(int i) const { return reinterpret_cast<uint64_t*>(base + kBarriers) + i % Tile::Stages; }
    __device__ uint64_t* empty(int i) const { return full(i) + Tile::Stages; }
    __device__ float* sums() const { return reinterpret_cast<float*>(base); }
};

template <typename T, typename Tile, WeightType W, int Group>
struct FewRowsKernel {
    using Shared = FewRowsShared<Tile, W, Group>;
    static constexpr int kSums = Tile::Columns / 2;        // of a lane
    static constexpr int kUnit = Group < 64 ? Group : 64;  // inputs that are unpacked at a time
    static constexpr int kUnits = kChunk / kUnit;          // of a chunk, an even number

    QuantizedGemmParams const& p;
    Shared shared;
    int block;   // the first of the weight
    int column;  // the first of the activations
    int chunks;  // of all
    int first;   // of this CTA
    int count;

    __device__ void produce(CUtensorMap const& activations) const {
        int const blocks = min(Tile::Blocks, (p.weight.out_features + kBlockRows - 1) / kBlockRows - block);
        auto const copy_weight = [&](int i) {
            uint64_t* const full = shared.full(i);
            uint32_t const of_blocks = blocks * (Shared::kBlockBytes + Shared::kScaleBytes);
            mbarrier_arrive_expect(full, of_blocks + 2 * Shared::kBoxBytes);
            for (int b = 0; b < blocks; ++b) {
                size_t const at = size_t(block + b) * chunks + first + i;
                bulk_copy(shared.stage(i) + Shared::kValues + b * Shared::kBlockBytes,
                          static_cast<uint8_t const*>(p.weight.values) + at * Shared::kBlockBytes, Shared::kBlockBytes,
                          full);
                bulk_copy(shared.stage(i) + Shared::kScales + b * Shared::kScaleBytes,
                          reinterpret_cast<uint8_t const*>(p.weight.scales) + at * Shared::kScaleBytes,
                          Shared::kScaleBytes, full);
            }
        };
        auto const copy_activations = [&](int i) {
            for (int box = 0; box < 2; ++box)
                copy_box(shared.stage(i) + box * Shared::kBoxBytes, activations, shared.full(i),
                         (first + i) * kChunk + box * 64, column);
        };
        // The weight does not wait for the kernel before, which makes the activations.
        allow_next_grid();
        int const ahead = min(Tile::Stages, count);
        for (int i = 0; i < ahead; ++i) copy_weight(i);
        wait_for_last_grid();
        for (int i = 0; i < ahead; ++i) copy_activations(i);
        for (int i = Tile::Stages; i < count; ++i) {
            mbarrier_wait(shared.empty(i), (i / Tile::Stages + 1) & 1);
            copy_weight(i);
            copy_activations(i);
        }
    }

    // What a warpgroup has in its registers: the operands of a unit of inputs being multiplied, those of the next being
    // unpacked, and the sums of one group and of all before.
    struct Consumer {
        uint32_t words[WeightLayout<W>::kLaneWords];
        uint32_t a[2][kUnit / 16][4];
        float parts[kSums], sums[kSums] = {};
        float scale = 0.0f, scale_8 = 0.0f;  // of parts
    };

    // Unpack a unit of a stage.
    template <int Unit>
    __device__ void unpack(Consumer& c, uint8_t const* stage, RowScales<T, W>& of) const {
        int const warp = int(threadIdx.x) / 32, lane = int(threadIdx.x) % 32;
        if constexpr (Unit * kUnit % Group == 0) {
            uint8_t const* const scales = stage + Shared::kScales + warp / 4 * Shared::kScaleBytes;
            int const at = (Unit * kUnit / Group * 4 + warp % 4) * 8 + lane / 4;
            of = RowScales<T, W>(reinterpret_cast<uint2 const*>(scales)[at]);
        }
#pragma unroll
        for (int i = 0; i < kUnit / 16; i += 2)
            of.unpack(c.words + (Unit * kUnit / 32 + i / 2) * WeightLayout<W>::kPairWords, c.a[Unit % 2] + i);
#pragma unroll
        for (int i = 0; i < kUnit / 16; ++i) hold(c.a[Unit % 2][i]);
    }

    __device__ void load(Consumer& c, int i) const {
        int const warp = int(threadIdx.x) / 32;
        mbarrier_wait(shared.full(i), i / Tile::Stages & 1);
        load_words<W>(
            shared.stage(i) + Shared::kValues + warp / 4 * Shared::kBlockBytes + warp % 4 * WeightLayout<W>::kWarpBytes,
            c.words);
    }

    // The products of a group, when they are done, times its scales.
    __device__ void add_parts(Consumer& c) const {
        wgmma_wait<0>();
        hold(c.parts);
#pragma unroll
        for (int i = 0; i < kSums; ++i) c.sums[i] += (i % 4 < 2 ? c.scale : c.scale_8) * c.parts[i];
    }

    // Multiply a unit of stage i, and unpack the next one meanwhile.
    template <int Unit = 0>
    __device__ void multiply(Consumer& c, int i, RowScales<T, W>& of) const {
        if constexpr (Unit < kUnits) {
            constexpr bool kBegins = Unit * kUnit % Group == 0;
            if constexpr (kBegins) {
                if (Unit > 0 || i > 0) add_parts(c);
                if (Unit == 0 && i > 0 && threadIdx.x % 32 == 0) mbarrier_arrive(shared.empty(i - 1));
                c.scale = of.scale;
                c.scale_8 = of.scale_8;
            }
            uint32_t const boxes = shared_address(shared.stage(i));
            wgmma_fence();
#pragma unroll
            for (int k = 0; k < kUnit / 16; ++k) {
                constexpr int kFirst = Unit * kUnit / 16;
                uint32_t const box = boxes + (kFirst + k) / 4 * Shared::kBoxBytes + (kFirst + k) % 4 * 32;
                Wgmma<T, Tile::Columns>::registers_by_columns(c.parts, c.a[Unit % 2][k],
                                                              swizzled_operand(box, 1024, 16), !kBegins || k > 0);
            }
            wgmma_commit();
            if constexpr (Unit + 1 < kUnits) {
                wgmma_wait<1>();  // of the unit before, whose registers these are
                unpack<Unit + 1>(c, shared.stage(i), of);
            } else if (i + 1 < count) {
                load(c, i + 1);
                wgmma_wait<1>();
                unpack<0>(c, shared.stage(i + 1), of);
            }
            multiply<Unit + 1>(c, i, of);
        }
    }

    __device__ void consume() const {
        Consumer c;
        RowScales<T, W> of(uint2{});
        load(c, 0);
        unpack<0>(c, shared.stage(0), of);
        for (int i = 0; i < count; ++i) multiply(c, i, of);
        add_parts(c);
        named_barrier_sync(1, Tile::Blocks * 128);  // the stages are done
        int const warp = int(threadIdx.x) / 32, g = int(threadIdx.x) % 32 / 4, t = int(threadIdx.x) % 4;
        float* const to = shared.sums() + 2 * t * Shared::kSumStride + warp * kWarpRows + g;
#pragma unroll
        for (int i = 0; i < kSums; ++i) to[(i / 4 * 8 + i % 2) * Shared::kSumStride + i % 4 / 2 * 8] = c.sums[i];
    }

    // The sums of all CTAs of the cluster, in their order, to y.
    __device__ void store(int rank, int ctas) const {
        int const columns = min(p.num_rows - column, Tile::Columns), row = block * kBlockRows;
        constexpr int kVectors = Tile::Rows / 4;
        for (int i = rank * Tile::Threads + int(threadIdx.x); i < columns * kVectors; i += Tile::Threads * ctas) {
            int const of = i / kVectors, m = i % kVectors * 4;
            if (row + m >= p.weight.out_features) continue;
            float4 y{};
            for (int cta = 0; cta < ctas; ++cta) {
                float4 const part = load_of_cluster(shared.sums() + of * Shared::kSumStride + m, cta);
                y.x += part.x;
                y.y += part.y;
                y.z += part.z;
                y.w += part.w;
            }
            auto* const to = static_cast<T*>(p.y) + size_t(column + of) * p.weight.out_features + row + m;
            *reinterpret_cast<uint2*>(to) = {pack_pair<T>(y.x, y.y), pack_pair<T>(y.z, y.w)};
        }
    }

    __device__ void run(CUtensorMap const& activations, int rank, int ctas) const {
        if (threadIdx.x == 0) {
            for (int i = 0; i < Tile::Stages; ++i) {
                mbarrier_init(shared.full(i), 1);
                mbarrier_init(shared.empty(i), Tile::Blocks * 4);
            }
            fence_bulk_copy();
        }
        __syncthreads();
        if (threadIdx.x < Tile::Blocks * 128) {
            consume();
        } else if (threadIdx.x == Tile::Blocks * 128) {
            produce(activations);
        }
        cluster_sync();
        store(rank, ctas);
        cluster_sync();  // until nobody reads this CTA's sums any more
    }
};

template <typename T, typename Tile, WeightType W, int Group>
__global__ void __launch_bounds__(kHopper ? Tile::Threads : 32, Tile::Ctas)
    few_rows_kernel(QuantizedGemmParams p, __grid_constant__ CUtensorMap const activations, int splits) {
    if constexpr (kHopper) {
        extern __shared__ uint8_t raw[];
        int const chunks = (p.weight.in_features + kChunk - 1) / kChunk, rank = int(blockIdx.x) % splits;
        int const first = chunks * rank / splits, count = chunks * (rank + 1) / splits - first;
        FewRowsKernel<T, Tile, W, Group> const kernel{p,
                                                      FewRowsShared<Tile, W, Group>(raw),
                                                      int(blockIdx.x) / splits * Tile::Blocks,
                                                      int(blockIdx.y) * Tile::Columns,
                                                      chunks,
                                                      first,
                                                      count};
        kernel.run(activations, rank, splits);
    }
}

}  // namespace saw
