// The launch of one format's instances, each in the version that the device runs.
#pragma once

#include <algorithm>
#include <mutex>

#include "../tensor_map.h"
#include "instances.h"
#include "saw/common/dispatch.h"
#include "saw/quantized_gemm/dequantize.cuh"
#include "saw/quantized_gemm/few_rows_sm80.cuh"
#include "saw/quantized_gemm/few_rows_sm90.cuh"
#include "saw/quantized_gemm/strips_sm90.cuh"

namespace saw {

// f(Tile{}) for some rows of activations: the fastest of those that were measured on an H200.
template <typename F>
cudaError_t dispatch_tile(int num_rows, F&& f) {
    if (num_rows <= 8) return f(FewRowsTile<2, 8, 5, 2>{});
    if (num_rows <= 16) return f(FewRowsTile<2, 16, 5, 2>{});
    if (num_rows <= 32) return f(FewRowsTile<4, 32, 5, 1>{});
    return f(FewRowsTile<2, 64, 5, 1>{});
}

constexpr int kMostSplits = 8;  // CTAs of a cluster

// What the current device runs of an instance, found at the first call; GPUs are alike in any machine that serves one
// engine.
struct Prepared {
    bool done = false;
    bool hopper = false;                 // whether its code was compiled for sm_90a
    int clusters[kMostSplits + 1] = {};  // that run at once, by their CTAs
};

// A launch whose CTAs form clusters, and begins before the last one has ended. The attributes are config's.
inline cudaLaunchConfig_t describe_launch(dim3 grid, int threads, int shared, int splits, cudaStream_t stream,
                                          cudaLaunchAttribute (&attributes)[2]) {
    attributes[0].id = cudaLaunchAttributeClusterDimension;
    attributes[0].val.clusterDim.x = splits;
    attributes[0].val.clusterDim.y = attributes[0].val.clusterDim.z = 1;
    attributes[1].id = cudaLaunchAttributeProgrammaticStreamSerialization;
    attributes[1].val.programmaticStreamSerializationAllowed = 1;
    cudaLaunchConfig_t config = {};
    config.gridDim = grid;
    config.blockDim = dim3(threads);
    config.dynamicSmemBytes = shared;
    config.stream = stream;
    config.attrs = attributes;
    config.numAttrs = 2;
    return config;
}

template <typename Kernel, typename Sm80Kernel>
cudaError_t prepare(Kernel* kernel, int threads, int shared, Sm80Kernel* sm80_kernel, int sm80_shared,
                    Prepared& prepared) {
    Prepared found;
    cudaFuncAttributes attributes;
    if (auto e = cudaFuncGetAttributes(&attributes, kernel)) return e;
    found.hopper = attributes.maxThreadsPerBlock >= threads;
    constexpr auto kMostShared = cudaFuncAttributeMaxDynamicSharedMemorySize;
    auto const e = found.hopper ? cudaFuncSetAttribute(kernel, kMostShared, shared)
                                : cudaFuncSetAttribute(sm80_kernel, kMostShared, sm80_shared);
    if (e != cudaSuccess) return e;
    for (int splits = 1; found.hopper && splits <= kMostSplits; ++splits) {
        cudaLaunchAttribute of_launch[2] = {};
        auto const config = describe_launch(dim3(splits), threads, shared, splits, nullptr, of_launch);
        if (auto e = cudaOccupancyMaxActiveClusters(&found.clusters[splits], kernel, &config)) return e;
    }
    found.done = true;
    prepared = found;
    return cudaSuccess;
}

// CTAs that share a weight's rows: as many as run at once.
inline int choose_splits(Prepared const& prepared, int tiles, int chunks) {
    int splits = std::min(kMostSplits, chunks);
    while (splits > 1 && prepared.clusters[splits] < tiles) --splits;
    return std::max(splits, 1);
}

template <typename T, typename Tile, WeightType W, int Group>
cudaError_t launch_tile(QuantizedGemmParams const& p, cudaStream_t stream) {
    auto* const kernel = &few_rows_kernel<T, Tile, W, Group>;
    auto* const sm80_kernel = &few_rows_sm80_kernel<T, W, Tile::Columns, Group>;
    constexpr int kShared = FewRowsShared<Tile, W, Group>::kBytes;
    constexpr int kSm80Shared = FewRowsSm80Stage<W, Tile::Columns, Group>::kShared;
    static Prepared prepared;
    static std::mutex mutex;
    {
        std::lock_guard<std::mutex> const lock(mutex);
        if (!prepared.done)
            if (auto e = prepare(kernel, Tile::Threads, kShared, sm80_kernel, kSm80Shared, prepared)) return e;
    }
    int const blocks = (p.weight.out_features + kBlockRows - 1) / kBlockRows;
    int const chunks = (p.weight.in_features + kChunk - 1) / kChunk;
    int const columns = (p.num_rows + Tile::Columns - 1) / Tile::Columns;
    if (!prepared.hopper) {
        sm80_kernel<<<dim3(blocks, columns), kSm80Threads, kSm80Shared, stream>>>(p);
        return cudaGetLastError();
    }
    CUtensorMap activations;
    if (auto e = map_rows(activations, p.x, p.num_rows, p.weight.in_features, Tile::Columns, p.dtype)) return e;
    int const tiles = (blocks + Tile::Blocks - 1) / Tile::Blocks;
    int const splits = choose_splits(prepared, tiles * columns, chunks);
    cudaLaunchAttribute attributes[2] = {};
    auto const config =
        describe_launch(dim3(tiles * splits, columns), Tile::Threads, kShared, splits, stream, attributes);
    return cudaLaunchKernelEx(&config, kernel, p, activations, splits);
}

template <typename T, WeightType W>
cudaError_t launch_strips(QuantizedGemmParams const& p, cudaStream_t stream) {
    auto* const kernel = &strip_kernel<T, W>;
    auto* const sm80_kernel = &few_rows_sm80_kernel<T, W, kStripRows, kChunk>;
    constexpr int kMostShared = StripShared<W>::bytes(kMostStrips);
    constexpr int kSm80Shared = FewRowsSm80Stage<W, kStripRows, kChunk>::kShared;
    static Prepared prepared;
    static std::mutex mutex;
    {
        std::lock_guard<std::mutex> const lock(mutex);
        if (!prepared.done)
            if (auto e = prepare(kernel, kStripThreads, kMostShared, sm80_kernel, kSm80Shared, prepared)) return e;
    }
    int const blocks = (p.weight.out_features + kBlockRows - 1) / kBlockRows;
    if (!prepared.hopper) {
        sm80_kernel<<<blocks, kSm80Threads, kSm80Shared, stream>>>(p);
        return cudaGetLastError();
    }
    // As few CTAs as run at once, as often as it takes.
    int const all = blocks * (kBlockRows / kWarpRows), at_once = prepared.clusters[1];
    int const waves = (all - 1) / (at_once * kMostStrips) + 1;
    int const strips = (all - 1) / (at_once * waves) + 1, ctas = (all - 1) / strips + 1;
    cudaLaunchAttribute attributes[2] = {};
    auto const config =
        describe_launch(dim3(ctas), kStripThreads, StripShared<W>::bytes(strips), 1, stream, attributes);
    return cudaLaunchKernelEx(&config, kernel, p, strips);
}

template <WeightType W, int Group>
cudaError_t launch_few_rows(QuantizedGemmParams const& p, cudaStream_t stream) {
    return dispatch_dtype(p.dtype, [&](auto type) {
        using T = decltype(type);
        if constexpr (Group == kChunk)
            if (p.num_rows <= kStripRows) return launch_strips<T, W>(p, stream);
        return dispatch_tile(p.num_rows,
                             [&](auto tile) { return launch_tile<T, decltype(tile), W, Group>(p, stream); });
    });
}

template <WeightType W, int Group>
cudaError_t launch_dequantize(DequantizeParams const& p, cudaStream_t stream) {
    dim3 const grid((p.weight.in_features + kChunk - 1) / kChunk, (p.num_rows + kBlockRows - 1) / kBlockRows);
    return dispatch_dtype(p.dtype, [&](auto type) {
        dequantize_kernel<decltype(type), W, Group><<<grid, 128, 0, stream>>>(p);
        return cudaGetLastError();
    });
}

}  // namespace saw
