// The kernel of gemm() on Hopper: few rows times one weight or two, near the speed at which weights are read.
//
// The weight is the tensor cores' operand A and activations are B, so that few of them are in vain. A CTA has 64 rows
// of each weight and a part of their inputs. One thread copies both operands ahead to shared memory, where a warpgroup
// for each weight multiplies them. CTAs that share rows of the weight are a cluster, and add their sums through each
// other's shared memory, always in one order.
#pragma once

#include "saw/common/sm90.cuh"
#include "saw/common/vec.cuh"
#include "saw/gemm/params.h"
#include "saw/silu_mul/silu.cuh"

namespace saw {

constexpr int kGemmRows = 64;     // of a weight in a CTA
constexpr int kGemmInputs = 128;  // of a stage, in two boxes

// Weights weights, with a warpgroup each, times Columns rows of activations.
template <int Weights_, int Columns_, int Stages_, int Ctas_>
struct GemmTile {
    static constexpr int Weights = Weights_, Columns = Columns_, Stages = Stages_;
    static constexpr int Ctas = Ctas_;  // on an SM
    static constexpr int Threads = 128 * Weights + 32;
};

// A CTA's shared memory: stages, each of two boxes for each weight and two of activations, swizzled.
template <typename Tile>
struct GemmShared {
    static constexpr int kWeightBox = kGemmRows * 128, kBox = Tile::Columns * 128;
    static constexpr int kActivations = Tile::Weights * 2 * kWeightBox;
    static constexpr int kStageBytes = kActivations + 2 * kBox;
    static constexpr int kStages = Tile::Stages * kStageBytes;
    // In the stages' place when they are done: each warpgroup's columns of sums, 4 numbers apart.
    static constexpr int kSumStride = kGemmRows + 4, kSums = Tile::Weights * Tile::Columns * kSumStride * 4;
    static constexpr int kBarriers = kStages > kSums ? kStages : kSums;
    static constexpr int kBytes = kBarriers + Tile::Stages * 16 + 1024;  // to begin on a multiple of 1024

    uint8_t* base;

    __device__ explicit GemmShared(uint8_t* raw) : base(raw + (1024 - shared_address(raw) % 1024) % 1024) {}
    __device__ uint8_t* stage(int i) const { return base + i % Tile::Stages * kStageBytes; }
    __device__ uint64_t* full(int i) const { return reinterpret_cast<uint64_t*>(base + kBarriers) + i % Tile::Stages; }
    __device__ uint64_t* empty(int i) const { return full(i) + Tile::Stages; }
    __device__ float* sums(int group) const {
        return reinterpret_cast<float*>(base) + group * Tile::Columns * kSumStride;
    }
};

template <typename T, typename Out, typename Tile>
struct GemmKernel {
    using Shared = GemmShared<Tile>;

    GemmParams const& p;
    Shared shared;
    int row;     // the first of the weights
    int column;  // the first of the activations
    int first;   // stage of this CTA
    int count;

    __device__ void produce(CUtensorMap const& weight, CUtensorMap const& gate, CUtensorMap const& activations) const {
        auto const copy_weights = [&](int i) {
            uint64_t* const full = shared.full(i);
            mbarrier_arrive_expect(full, Shared::kStageBytes);
            for (int box = 0; box < 2; ++box) {
                int const input = (first + i) * kGemmInputs + box * 64;
                for (int group = 0; group < Tile::Weights; ++group)
                    copy_box(shared.stage(i) + (2 * group + box) * Shared::kWeightBox, group == 0 ? weight : gate, full,
                             input, row);
            }
        };
        auto const copy_activations = [&](int i) {
            for (int box = 0; box < 2; ++box)
                copy_box(shared.stage(i) + Shared::kActivations + box * Shared::kBox, activations, shared.full(i),
                         (first + i) * kGemmInputs + box * 64, column);
        };
        // Weights do not wait for the kernel before, which makes the activations.
        int const ahead = min(Tile::Stages, count);
        for (int i = 0; i < ahead; ++i) copy_weights(i);
        wait_for_last_grid();
        for (int i = 0; i < ahead; ++i) copy_activations(i);
        for (int i = Tile::Stages; i < count; ++i) {
            mbarrier_wait(shared.empty(i), (i / Tile::Stages + 1) & 1);
            copy_weights(i);
            copy_activations(i);
        }
    }

    // A warpgroup's products, their sums to shared memory.
    __device__ void consume() const {
        float sums[Tile::Columns / 2] = {};
        int const group = int(threadIdx.x) / 128;
        for (int i = 0; i < count; ++i) {
            mbarrier_wait(shared.full(i), i / Tile::Stages & 1);
            uint32_t const stage = shared_address(shared.stage(i));
            uint32_t const weight = stage + group * 2 * Shared::kWeightBox, activations = stage + Shared::kActivations;
            wgmma_fence();
#pragma unroll
            for (int k = 0; k < kGemmInputs / 16; ++k)
                Wgmma<T, Tile::Columns>::shared(
                    sums, swizzled_operand(weight + k / 4 * Shared::kWeightBox + k % 4 * 32, 1024, 16),
                    swizzled_operand(activations + k / 4 * Shared::kBox + k % 4 * 32, 1024, 16), i > 0 || k > 0);
            wgmma_commit();
            if (i > 0) {
                wgmma_wait<1>();
                if (threadIdx.x % 32 == 0) mbarrier_arrive(shared.empty(i - 1));
            }
        }
        wgmma_wait<0>();
        hold(sums);
        named_barrier_sync(1, Tile::Weights * 128);  // the stages are done
        int const warp = int(threadIdx.x) % 128 / 32, g = int(threadIdx.x) % 32 / 4, t = int(threadIdx.x) % 4;
        float* const to = shared.sums(group) + 2 * t * Shared::kSumStride + warp * 16 + g;
#pragma unroll
        for (int i = 0; i < Tile::Columns / 2; ++i)
            to[(i / 4 * 8 + i % 2) * Shared::kSumStride + i % 4 / 2 * 8] = sums[i];
    }

    // Four of a warpgroup's sums, of all CTAs of the cluster in their order.
    __device__ float4 add_parts(int group, int at, int ctas) const {
        float4 sum{};
        for (int cta = 0; cta < ctas; ++cta) {
            float4 const part = load_of_cluster(shared.sums(group) + at, cta);
            sum.x += part.x;
            sum.y += part.y;
            sum.z += part.z;
            sum.w += part.w;
        }
        return sum;
    }

    // This CTA's part of the cluster's sums to y, which nobody reads any more: a sum has activations in it, and those
    // were copied after the kernel before had ended.
    __device__ void store(int rank, int ctas) const {
        int const columns = min(p.num_rows - column, Tile::Columns);
        constexpr int kVectors = kGemmRows / 4;
        for (int i = rank * Tile::Threads + int(threadIdx.x); i < columns * kVectors; i += Tile::Threads * ctas) {
            int const of = i / kVectors, m = i % kVectors * 4, at = of * Shared::kSumStride + m;
            if (row + m >= p.out_features) continue;
            float4 y = add_parts(0, at, ctas);
            if constexpr (Tile::Weights == 2) {
                float4 const gate = add_parts(1, at, ctas);
                // As if each product had been stored, which those of many rows are.
                auto const gated = [](float a, float b) {
                    return silu(to_float(from_float<T>(a))) * to_float(from_float<T>(b));
                };
                y = {gated(y.x, gate.x), gated(y.y, gate.y), gated(y.z, gate.z), gated(y.w, gate.w)};
            }
            Out* const to = static_cast<Out*>(p.y) + size_t(column + of) * p.out_features + row + m;
            if constexpr (sizeof(Out) == 4) {
                *reinterpret_cast<float4*>(to) = y;
            } else {
                *reinterpret_cast<uint2*>(to) = {pack_pair<T>(y.x, y.y), pack_pair<T>(y.z, y.w)};
            }
        }
    }

    __device__ void run(CUtensorMap const& weight, CUtensorMap const& gate, CUtensorMap const& activations, int rank,
                        int ctas) const {
        if (threadIdx.x == 0) {
            for (int i = 0; i < Tile::Stages; ++i) {
                mbarrier_init(shared.full(i), 1);
                mbarrier_init(shared.empty(i), Tile::Weights * 4);
            }
            fence_bulk_copy();
        }
        __syncthreads();
        allow_next_grid();
        if (threadIdx.x < Tile::Weights * 128) {
            consume();
        } else if (threadIdx.x == Tile::Weights * 128) {
            produce(weight, gate, activations);
        }
        cluster_sync();
        store(rank, ctas);
        cluster_sync();  // until nobody reads this CTA's sums any more
    }
};

template <typename T, typename Out, typename Tile>
__global__ void __launch_bounds__(kHopper ? Tile::Threads : 32, Tile::Ctas)
    gemm_kernel(GemmParams p, __grid_constant__ CUtensorMap const weight, __grid_constant__ CUtensorMap const gate,
                __grid_constant__ CUtensorMap const activations, int splits) {
    if constexpr (kHopper) {
        extern __shared__ uint8_t raw[];
        int const stages = (p.in_features + kGemmInputs - 1) / kGemmInputs, rank = int(blockIdx.x) % splits;
        int const first = stages * rank / splits, count = stages * (rank + 1) / splits - first;
        GemmKernel<T, Out, Tile> const kernel{
            p,    GemmShared<Tile>(raw), int(blockIdx.x) / splits * kGemmRows, int(blockIdx.y) * Tile::Columns, first,
            count};
        kernel.run(weight, gate, activations, rank, splits);
    }
}

}  // namespace saw
