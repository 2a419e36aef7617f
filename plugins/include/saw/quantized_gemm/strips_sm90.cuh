// The kernel of quantized_gemm() on Hopper for the fewest rows: near the speed at which the memory gives the weight.
//
// A CTA has strips of 16 rows of the weight and all of their inputs. Its warps share the chunks, and each copies the
// weight ahead to a ring of its own, from which a lane reads what it copied itself. So nobody waits for another warp
// before the end, where the warps' sums are added in their order. The activations of a chunk are the tensor cores'
// operand B, in registers, for all strips.
#pragma once

#include "saw/quantized_gemm/weights.cuh"

namespace saw {

constexpr int kStripWarps = 8, kStripThreads = 32 * kStripWarps;
constexpr int kStripRows = 8;   // of activations
constexpr int kMostStrips = 5;  // of a CTA, so that an SM has room for two

// A CTA's shared memory: of each warp its stages and a chunk of activations, then of each warp the sums of each strip.
template <WeightType W>
struct StripShared {
    static constexpr int kStages = 4;
    static constexpr int kScales = WeightLayout<W>::kWarpBytes, kStageBytes = kScales + 32 * 8;
    static constexpr int kRing = kStages * kStageBytes;
    static constexpr int kRow = 2 * kChunk + 16;  // of activations: rows begin four banks apart
    static constexpr int kActivations = kStripRows * kRow;
    static constexpr int kSums = 32 * 16;  // of a strip: four numbers a lane

    static constexpr int bytes(int strips) { return kStripWarps * (kRing + kActivations + strips * kSums); }
};

template <typename T, WeightType W>
struct StripKernel {
    using Layout = WeightLayout<W>;
    using Shared = StripShared<W>;
    static constexpr int kPieces = Layout::kLaneWords / 4, kSteps = kChunk / 16;
    static constexpr int kLoads = kStripRows * kChunk / 8 / 32;  // of 16 bytes of activations, of a lane

    QuantizedGemmParams const& p;
    uint8_t* shared;
    int strips;  // of a CTA, and the distance of the sums of two warps
    int warp, lane;
    int chunks;        // of all
    int first, count;  // strips of this CTA
    int units;         // of this warp: strips of a chunk, which follow each other, of its chunks
    // What is copied next, and where to.
    int issued = 0, next_strip = 0, next_chunk, next_stage = 0;

    __device__ StripKernel(QuantizedGemmParams const& p, uint8_t* shared, int strips)
        : p(p),
          shared(shared),
          strips(strips),
          warp(int(threadIdx.x) / 32),
          lane(int(threadIdx.x) % 32),
          chunks((p.weight.in_features + kChunk - 1) / kChunk),
          first(int(blockIdx.x) * strips),
          next_chunk(warp) {
        int const all = (p.weight.out_features + kBlockRows - 1) / kBlockRows * (kBlockRows / kWarpRows);
        count = min(strips, all - first);
        units = (chunks - warp + kStripWarps - 1) / kStripWarps * count;
    }

    __device__ uint8_t* stage(int i) const { return shared + warp * Shared::kRing + i * Shared::kStageBytes; }
    __device__ uint8_t* activations() const {
        return shared + kStripWarps * Shared::kRing + warp * Shared::kActivations;
    }
    __device__ float4* sums() const {
        return reinterpret_cast<float4*>(shared + kStripWarps * (Shared::kRing + Shared::kActivations));
    }

    __device__ void copy_next() {
        if (issued < units) {
            int const strip = first + next_strip;
            size_t const block = size_t(strip / 4) * chunks + next_chunk;
            auto const* const values = static_cast<uint8_t const*>(p.weight.values) + block * Layout::kBlockBytes +
                                       strip % 4 * Layout::kWarpBytes + lane * 16;
            auto const* const scales =
                reinterpret_cast<uint2 const*>(p.weight.scales) + block * (kBlockRows / 2) + strip % 4 * 8 + lane / 4;
            uint32_t const to = shared_address(stage(next_stage));
#pragma unroll
            for (int i = 0; i < kPieces; ++i) copy_async(to + lane * 16 + i * 512, values + i * 512, 16);
            copy_async_8(to + Shared::kScales + lane * 8, scales);
            if (++next_strip == count) {
                next_strip = 0;
                next_chunk += kStripWarps;
            }
            next_stage = next_stage + 1 == Shared::kStages ? 0 : next_stage + 1;
        }
        ++issued;
        end_copy_group();
    }

    // A chunk that the inputs end in has zeros behind them in the weight, but x has none.
    __device__ void load_activations(int chunk, uint4 (&x)[kLoads]) const {
#pragma unroll
        for (int i = 0; i < kLoads; ++i) {
            int const row = i * 2 + lane / 16, input = chunk * kChunk + lane % 16 * 8;
            auto const* const from = static_cast<T const*>(p.x) + size_t(row) * p.weight.in_features + input;
            bool const there = row < p.num_rows && input < p.weight.in_features;
            x[i] = there ? *reinterpret_cast<uint4 const*>(from) : uint4{};
        }
    }

    // From what lanes have loaded to what mma takes.
    __device__ void turn_activations(uint4 const (&x)[kLoads], uint32_t (&b)[kSteps / 2][4]) const {
        __syncwarp();
#pragma unroll
        for (int i = 0; i < kLoads; ++i)
            *reinterpret_cast<uint4*>(activations() + (i * 2 + lane / 16) * Shared::kRow + lane % 16 * 16) = x[i];
        __syncwarp();
#pragma unroll
        for (int pair = 0; pair < kSteps / 2; ++pair)
            load_matrices(b[pair], activations() + lane % 8 * Shared::kRow + pair * 64 + lane / 8 * 16);
    }

    __device__ void multiply(uint8_t const* from, uint32_t const (&b)[kSteps / 2][4], float4& y) {
        uint32_t words[Layout::kLaneWords];
        load_words<W>(from, words);
        RowScales<T, W> const of(*reinterpret_cast<uint2 const*>(from + Shared::kScales + lane * 8));
        copy_next();  // to the stage before
        float parts[4] = {};
#pragma unroll
        for (int pair = 0; pair < kSteps / 2; ++pair) {
            uint32_t a[2][4];
            of.unpack(words + pair * Layout::kPairWords, a);
            mma_16x8x16<T>(parts, a[0][0], a[0][1], a[0][2], a[0][3], b[pair][0], b[pair][1]);
            mma_16x8x16<T>(parts, a[1][0], a[1][1], a[1][2], a[1][3], b[pair][2], b[pair][3]);
        }
        y.x += of.scale * parts[0];
        y.y += of.scale * parts[1];
        y.z += of.scale_8 * parts[2];
        y.w += of.scale_8 * parts[3];
    }

    __device__ void run() {
        // The weight does not wait for the kernel before, which makes the activations.
        allow_next_grid();
#pragma unroll
        for (int i = 0; i < Shared::kStages - 1; ++i) copy_next();
        wait_for_last_grid();
        uint4 x[kLoads];
        load_activations(warp, x);
        int at = 0;
        for (int chunk = warp; chunk < chunks; chunk += kStripWarps) {
            uint32_t b[kSteps / 2][4];
            turn_activations(x, b);
            if (chunk + kStripWarps < chunks) load_activations(chunk + kStripWarps, x);
            for (int strip = 0; strip < count; ++strip) {
                wait_for_copies<Shared::kStages - 2>();
                float4* const sum = sums() + (warp * strips + strip) * 32 + lane;
                float4 y = chunk == warp ? float4{} : *sum;
                multiply(stage(at), b, y);
                *sum = y;
                at = at + 1 == Shared::kStages ? 0 : at + 1;
            }
        }
        copy_async_wait();
        __syncthreads();
        store();
    }

    __device__ void store() const {
        int const warps = min(kStripWarps, chunks), out = p.weight.out_features;
        for (int i = int(threadIdx.x); i < count * 32; i += kStripThreads) {
            float4 y{};
            for (int w = 0; w < warps; ++w) {
                float4 const part = sums()[w * strips * 32 + i];
                y.x += part.x;
                y.y += part.y;
                y.z += part.z;
                y.w += part.w;
            }
            int const column = i % 4 * 2, row = (first + i / 32) * kWarpRows + i % 32 / 4;
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

template <typename T, WeightType W>
__global__ void __launch_bounds__(kHopper ? kStripThreads : 32, 2) strip_kernel(QuantizedGemmParams p, int strips) {
    if constexpr (kHopper) {
        extern __shared__ __align__(16) uint8_t shared[];
        StripKernel<T, W>(p, shared, strips).run();
    }
}

}  // namespace saw
