// The launch of one format's instances, each in the version that the device runs.
#pragma once

#include "../split_launch.cuh"
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

template <typename T, typename Tile, WeightType W, int Group>
cudaError_t launch_tile(QuantizedGemmParams const& p, cudaStream_t stream) {
    auto* const kernel = &few_rows_kernel<T, Tile, W, Group>;
    auto* const sm80_kernel = &few_rows_sm80_kernel<T, W, Tile::Columns, Group>;
    constexpr int kShared = FewRowsShared<Tile, W, Group>::kBytes;
    constexpr int kSm80Shared = FewRowsSm80Stage<W, Tile::Columns, Group>::kShared;
    static SplitLaunch known;
    if (auto e = known.prepare(kernel, Tile::Threads, kShared)) return e;
    int const blocks = (p.weight.out_features + kBlockRows - 1) / kBlockRows;
    int const chunks = (p.weight.in_features + kChunk - 1) / kChunk;
    int const columns = (p.num_rows + Tile::Columns - 1) / Tile::Columns;
    if (!known.hopper()) {
        if (auto e = cudaFuncSetAttribute(sm80_kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, kSm80Shared))
            return e;
        sm80_kernel<<<dim3(blocks, columns), kSm80Threads, kSm80Shared, stream>>>(p);
        return cudaGetLastError();
    }
    CUtensorMap activations;
    if (auto e = map_rows(activations, p.x, p.num_rows, p.weight.in_features, Tile::Columns, p.dtype)) return e;
    int const tiles = (blocks + Tile::Blocks - 1) / Tile::Blocks;
    int const splits = known.splits(tiles * columns, chunks);
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
    static SplitLaunch known;
    if (auto e = known.prepare(kernel, kStripThreads, kMostShared)) return e;
    int const blocks = (p.weight.out_features + kBlockRows - 1) / kBlockRows;
    if (!known.hopper()) {
        if (auto e = cudaFuncSetAttribute(sm80_kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, kSm80Shared))
            return e;
        sm80_kernel<<<blocks, kSm80Threads, kSm80Shared, stream>>>(p);
        return cudaGetLastError();
    }
    // As few CTAs as run at once, as often as it takes.
    int const all = blocks * (kBlockRows / kWarpRows), at_once = known.at_once(1);
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
