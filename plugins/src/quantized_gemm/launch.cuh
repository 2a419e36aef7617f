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

template <typename T, WeightType W, int Columns, int Group>
cudaError_t launch_sm80(QuantizedGemmParams const& p, cudaStream_t stream) {
    auto* const kernel = &few_rows_sm80_kernel<T, W, Columns, Group>;
    constexpr int kShared = FewRowsSm80Stage<W, Columns, Group>::kShared;
    if (auto e = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, kShared)) return e;
    int const blocks = (p.weight.out_features + kBlockRows - 1) / kBlockRows;
    kernel<<<dim3(blocks, (p.num_rows + Columns - 1) / Columns), kSm80Threads, kShared, stream>>>(p);
    return cudaGetLastError();
}

template <typename T, typename Tile, WeightType W, int Group>
cudaError_t launch_tile(QuantizedGemmParams const& p, cudaStream_t stream) {
    auto* const kernel = &few_rows_kernel<T, Tile, W, Group>;
    constexpr int kShared = FewRowsShared<Tile, W, Group>::kBytes;
    static SplitLaunch known;
    if (auto e = known.prepare(kernel, Tile::Threads, kShared)) return e;
    if (!known.hopper()) return launch_sm80<T, W, Tile::Columns, Group>(p, stream);
    CUtensorMap activations;
    if (auto e = map_rows(activations, p.x, p.num_rows, p.weight.in_features, Tile::Columns, p.dtype)) return e;
    int const blocks = (p.weight.out_features + kBlockRows - 1) / kBlockRows;
    int const tiles = (blocks + Tile::Blocks - 1) / Tile::Blocks;
    int const columns = (p.num_rows + Tile::Columns - 1) / Tile::Columns;
    int const splits = known.splits(tiles * columns, (p.weight.in_features + kChunk - 1) / kChunk);
    cudaLaunchAttribute attributes[2] = {};
    auto const config =
        describe_launch(dim3(tiles * splits, columns), Tile::Threads, kShared, splits, stream, attributes);
    return cudaLaunchKernelEx(&config, kernel, p, activations, splits);
}

template <typename T, WeightType W, int Tiles, int Strips = kMostStrips>
cudaError_t launch_strips(QuantizedGemmParams const& p, int strips, cudaStream_t stream) {
    if constexpr (Strips > 1)
        if (strips < Strips) return launch_strips<T, W, Tiles, Strips - 1>(p, strips, stream);
    using Tile = StripTile<Tiles, Strips>;
    auto* const kernel = &strip_kernel<T, Tile, W>;
    constexpr int kShared = StripShared<Tile, W>::kBytes;
    static SplitLaunch known;
    if (auto e = known.prepare(kernel, kStripThreads, kShared)) return e;
    if (!known.hopper()) return launch_sm80<T, W, Tile::Rows, kChunk>(p, stream);
    int const ctas = (count_strips(p.weight) - 1) / Strips + 1;
    cudaLaunchAttribute attributes[2] = {};
    auto const config = describe_launch(dim3(ctas), kStripThreads, kShared, 1, stream, attributes);
    return cudaLaunchKernelEx(&config, kernel, p);
}

// Strips of a CTA: a CTA for each multiprocessor, as often as it takes.
inline int strips_of_cta(QuantizedGemmParams const& p, int multiprocessors) {
    int const all = count_strips(p.weight);
    int const waves = (all - 1) / (multiprocessors * kMostStrips) + 1;
    return (all - 1) / (multiprocessors * waves) + 1;
}

template <WeightType W, int Group>
cudaError_t launch_few_rows(QuantizedGemmParams const& p, cudaStream_t stream) {
    int multiprocessors = 0;
    if (auto e = count_multiprocessors(multiprocessors)) return e;
    int const strips = strips_of_cta(p, multiprocessors);
    // Of long sums with few strips, the tiles' clusters are faster from 9 rows on.
    int const most = strips <= 2 && p.weight.in_features > 64 * kChunk ? 8 : 16;
    return dispatch_dtype(p.dtype, [&](auto type) {
        using T = decltype(type);
        if constexpr (Group == kChunk) {
            if (p.num_rows <= 8) return launch_strips<T, W, 1>(p, strips, stream);
            if (p.num_rows <= most) return launch_strips<T, W, 2>(p, strips, stream);
        }
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
