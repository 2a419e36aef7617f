// The kernel of quantized_gemm() on Hopper for the fewest rows: near the speed at which the memory gives the weight.
//
// A CTA has strips of 16 rows of the weight and all of their inputs. Its warps share the chunks, and each copies the
// weight and the activations ahead to rings of its own. So nobody waits for another warp before the end, where the
// warps' sums are added in their order. The activations of a chunk are the tensor cores' operand B, in registers, for
// all strips, and so are the sums: strips are unrolled, and what several of them wait for overlaps.
#pragma once

#include "saw/quantized_gemm/weights.cuh"

namespace saw {

constexpr int kStripWarps = 8, kStripThreads = 32 * kStripWarps;
constexpr int kMostStrips = 7;  // of a CTA

// Strips of a weight.
__host__ __device__ inline int count_strips(PackedWeight const& weight) {
    return (weight.out_features + kBlockRows - 1) / kBlockRows * (kBlockRows / kWarpRows);
}

// Tiles times 8 rows of activations by Strips strips.
template <int Tiles_, int Strips_>
struct StripTile {
    static constexpr int Tiles = Tiles_, Strips = Strips_, Rows = 8 * Tiles;
};

// A warp's shared memory: a stage for each strip of each chunk that is on its way, then those chunks' activations. In
// their place, when they are done: the warp's sums.
template <typename Tile, WeightType W>
struct StripShared {
    static constexpr int kScales = WeightLayout<W>::kWarpBytes, kStageBytes = kScales + 32 * 8;
    static constexpr int kRow = 2 * kChunk + 16;  // of activations: rows begin four banks apart
    static constexpr int kActivations = Tile::Rows * kRow, kChunkBytes = Tile::Strips * kStageBytes + kActivations;
    static constexpr int kFit = 216 * 1024 / (kStripWarps * kChunkBytes);
    // Chunks on their way: 6 to 8 stages, as far as there is room.
    static constexpr int kWanted = Tile::Strips > 4 ? 1 : Tile::Strips > 2 ? 2 : 5 - Tile::Tiles;
    static constexpr int kAhead = kWanted < kFit ? kWanted : kFit, kStages = Tile::Strips * kAhead;
    static constexpr int kRing = kStages * kStageBytes, kCopies = kAhead * kChunkBytes;
    static constexpr int kSums = Tile::Strips * Tile::Tiles * 32 * 16;
    static constexpr int kWarpBytes = kCopies > kSums ? kCopies : kSums;
    static constexpr int kBytes = kStripWarps * kWarpBytes;
    static_assert(kAhead > 0);
};

template <typename T, typename Tile, WeightType W>
struct StripKernel {
    using Layout = WeightLayout<W>;
    using Shared = StripShared<Tile, W>;
    static constexpr int kTiles = Tile::Tiles, kStrips = Tile::Strips;
    static constexpr int kAhead = Shared::kAhead, kStages = Shared::kStages;
    static constexpr int kPieces = Layout::kLaneWords / 4, kPairs = kChunk / 32;
    // Strips that are read from shared memory at once: the fastest of those that were measured on an H200.
    static constexpr int kMost = kTiles > 1 ? 1 : W == WeightType::kInt4 ? 4 : 2;
    static constexpr int kAtOnce = kMost < kStrips ? kMost : kStrips;
    using Operand = uint32_t[kTiles][kPairs][4];
    using Sums = float[kStrips][kTiles][4];

    QuantizedGemmParams const& p;
    uint8_t* shared;  // of this warp
    int warp, lane;
    int chunks, strips;   // of all
    int first;            // strip of this CTA
    int count;            // chunks of this warp
    int places[kStrips];  // of a strip's first chunk for this warp, in 16 rows by 128 inputs

    __device__ StripKernel(QuantizedGemmParams const& p, uint8_t* all)
        : p(p),
          warp(int(threadIdx.x) / 32),
          lane(int(threadIdx.x) % 32),
          chunks((p.weight.in_features + kChunk - 1) / kChunk),
          strips(count_strips(p.weight)),
          first(int(blockIdx.x) * kStrips),
          count((chunks - warp + kStripWarps - 1) / kStripWarps) {
        shared = all + warp * Shared::kWarpBytes;
#pragma unroll
        for (int s = 0; s < kStrips; ++s) {
            int const strip = min(first + s, strips - 1);  // the last CTA may have one several times
            places[s] = (strip / 4 * chunks + warp) * 4 + strip % 4;
        }
    }

    __device__ uint8_t* stage(int ring, int s) const { return shared + (ring * kStrips + s) * Shared::kStageBytes; }
    __device__ uint8_t* activations(int ring) const { return shared + Shared::kRing + ring * Shared::kActivations; }

    // Of the warp's i-th chunk.
    __device__ void copy_strip(int i, int ring, int s) const {
        size_t const at = uint32_t(places[s] + i * kStripWarps * 4);
        uint32_t const to = shared_address(stage(ring, s));
        auto const* const values = static_cast<uint8_t const*>(p.weight.values) + at * Layout::kWarpBytes + lane * 16;
        auto const* const scales = reinterpret_cast<uint2 const*>(p.weight.scales) + at * 8 + lane / 4;
#pragma unroll
        for (int j = 0; j < kPieces; ++j) copy_async(to + lane * 16 + j * 512, values + j * 512, 16);
        copy_async_8(to + Shared::kScales + lane * 8, scales);
    }

    // A chunk that the inputs end in has zeros after them in the weight, but x has none.
    __device__ void copy_activations(int i, int ring) const {
        int const input = (warp + i * kStripWarps) * kChunk + lane % 16 * 8;
        uint32_t const to = shared_address(activations(ring)) + lane % 16 * 16;
#pragma unroll
        for (int j = 0; j < Tile::Rows / 2; ++j) {
            int const row = j * 2 + lane / 16;
            bool const there = row < p.num_rows && input < p.weight.in_features;
            copy_async(to + row * Shared::kRow,
                       static_cast<T const*>(p.x) + (there ? size_t(row) * p.weight.in_features + input : 0),
                       there ? 16 : 0);
        }
    }

    // To registers, and in their place the next chunk's. Their copies were begun with a strip's that is there.
    __device__ void load_activations(int i, int ring, Operand& b) const {
        __syncwarp();
#pragma unroll
        for (int n = 0; n < kTiles; ++n)
#pragma unroll
            for (int pair = 0; pair < kPairs; ++pair)
                load_matrices(b[n][pair],
                              activations(ring) + (n * 8 + lane % 8) * Shared::kRow + pair * 64 + lane / 8 * 16);
        __syncwarp();
        if (i + kAhead < count) copy_activations(i + kAhead, ring);
    }

    __device__ void multiply_strip(uint32_t const (&words)[Layout::kLaneWords], uint2 scales, Operand const& b,
                                   float (&sums)[kTiles][4]) const {
        RowScales<T, W> const of(scales);
        float parts[kTiles][4] = {};
#pragma unroll
        for (int pair = 0; pair < kPairs; ++pair) {
            uint32_t a[2][4];
            of.unpack(words + pair * Layout::kPairWords, a);
#pragma unroll
            for (int n = 0; n < kTiles; ++n) {
                uint32_t const(&x)[4] = b[n][pair];
                mma_16x8x16<T>(parts[n], a[0][0], a[0][1], a[0][2], a[0][3], x[0], x[1]);
                mma_16x8x16<T>(parts[n], a[1][0], a[1][1], a[1][2], a[1][3], x[2], x[3]);
            }
        }
#pragma unroll
        for (int n = 0; n < kTiles; ++n)
#pragma unroll
            for (int j = 0; j < 4; ++j) sums[n][j] += (j < 2 ? of.scale : of.scale_8) * parts[n][j];
    }

    // The strips of the warp's i-th chunk from one on; the first have been waited for.
    template <int Strip = 0>
    __device__ void multiply(int i, int ring, Operand const& b, Sums& sums) const {
        if constexpr (Strip < kStrips) {
            constexpr int kHere = kAtOnce < kStrips - Strip ? kAtOnce : kStrips - Strip;
            if constexpr (Strip > 0) wait_for_copies<kStages - kHere>();
            uint32_t words[kHere][Layout::kLaneWords];
            uint2 scales[kHere];
#pragma unroll
            for (int s = 0; s < kHere; ++s) {
                load_words<W>(stage(ring, Strip + s), words[s]);
                scales[s] = *reinterpret_cast<uint2 const*>(stage(ring, Strip + s) + Shared::kScales + lane * 8);
            }
#pragma unroll
            for (int s = 0; s < kHere; ++s) {
                if (i + kAhead < count) copy_strip(i + kAhead, ring, Strip + s);
                end_copy_group();
            }
#pragma unroll
            for (int s = 0; s < kHere; ++s) multiply_strip(words[s], scales[s], b, sums[Strip + s]);
            multiply<Strip + kHere>(i, ring, b, sums);
        }
    }

    __device__ void run() const {
        // The weight does not wait for the kernel before, which makes the activations.
        allow_next_grid();
        for (int i = 0; i < kAhead && i < count; ++i)
#pragma unroll
            for (int s = 0; s < kStrips; ++s) copy_strip(i, i, s);
        wait_for_last_grid();
        for (int i = 0; i < kAhead && i < count; ++i) copy_activations(i, i);
        copy_async_wait();
        Sums sums = {};
        int ring = 0;
        for (int i = 0; i < count; ++i) {
            wait_for_copies<kStages - kAtOnce>();
            Operand b;
            load_activations(i, ring, b);
            multiply(i, ring, b, sums);
            ring = ring + 1 == kAhead ? 0 : ring + 1;
        }
        copy_async_wait();
        __syncwarp();
        auto* const to = reinterpret_cast<float4*>(shared) + lane;
#pragma unroll
        for (int s = 0; s < kStrips; ++s)
#pragma unroll
            for (int n = 0; n < kTiles; ++n) {
                float const(&y)[4] = sums[s][n];
                to[(s * kTiles + n) * 32] = make_float4(y[0], y[1], y[2], y[3]);
            }
        __syncthreads();
        store();
    }

    __device__ void store() const {
        int const warps = min(kStripWarps, chunks), here = min(kStrips, strips - first), out = p.weight.out_features;
        uint8_t const* const of_warps = shared - warp * Shared::kWarpBytes;
        for (int i = int(threadIdx.x); i < here * kTiles * 32; i += kStripThreads) {
            float4 y{};
            for (int w = 0; w < warps; ++w) {
                float4 const part = reinterpret_cast<float4 const*>(of_warps + w * Shared::kWarpBytes)[i];
                y.x += part.x;
                y.y += part.y;
                y.z += part.z;
                y.w += part.w;
            }
            int const column = i / 32 % kTiles * 8 + i % 4 * 2;
            int const row = (first + i / (32 * kTiles)) * kWarpRows + i % 32 / 4;
            auto* const to = static_cast<T*>(p.y) + size_t(column) * out + row;
            auto const put = [&](int h, int j, float number) {
                if (column + j < p.num_rows && row + h < out) to[size_t(j) * out + h] = from_float<T>(number);
            };
            put(0, 0, y.x);
            put(0, 1, y.y);
            put(8, 0, y.z);
            put(8, 1, y.w);
        }
    }
};

template <typename T, typename Tile, WeightType W>
__global__ void __launch_bounds__(kHopper ? kStripThreads : 32, 1) strip_kernel(QuantizedGemmParams p) {
    if constexpr (kHopper) {
        extern __shared__ __align__(16) uint8_t shared[];
        StripKernel<T, Tile, W>(p, shared).run();
    }
}

}  // namespace saw
