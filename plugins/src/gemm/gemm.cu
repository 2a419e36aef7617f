#include "../split_launch.cuh"
#include "../tensor_map.h"
#include "saw/common/dispatch.h"
#include "saw/gemm/few_rows_sm90.cuh"
#include "saw/gemm/params.h"

namespace saw {

namespace {

// f(Tile{}) for some rows of activations: the fastest of those that were measured on an H200.
template <int Weights, typename F>
cudaError_t dispatch_tile(int num_rows, F&& f) {
    constexpr bool kGated = Weights == 2;
    if (num_rows <= 8) return f(GemmTile<Weights, 8, kGated ? 3 : 6, 2>{});
    return f(GemmTile<Weights, 16, kGated ? 3 : 5, 2>{});
}

template <typename T, typename Out, typename Tile>
struct Instance {
    static constexpr auto* kKernel = &gemm_kernel<T, Out, Tile>;
    static constexpr int kShared = GemmShared<Tile>::kBytes;

    // What the current device runs of it.
    static cudaError_t prepare(SplitLaunch const*& launch) {
        static SplitLaunch of_kernel;
        launch = &of_kernel;
        return of_kernel.prepare(kKernel, Tile::Threads, kShared);
    }

    static cudaError_t launch(GemmParams const& p, cudaStream_t stream) {
        SplitLaunch const* known = nullptr;
        if (auto e = prepare(known)) return e;
        if (!known->hopper()) return cudaErrorNoKernelImageForDevice;
        CUtensorMap weight, gate, activations;
        auto const map = [&](CUtensorMap& of, void const* base, int rows, int box) {
            return map_rows(of, base, rows, p.in_features, box, p.dtype);
        };
        if (auto e = map(weight, p.weight, p.out_features, kGemmRows)) return e;
        if (auto e = map(gate, p.gate != nullptr ? p.gate : p.weight, p.out_features, kGemmRows)) return e;
        if (auto e = map(activations, p.x, p.num_rows, Tile::Columns)) return e;
        int const tiles = (p.out_features + kGemmRows - 1) / kGemmRows;
        int const columns = (p.num_rows + Tile::Columns - 1) / Tile::Columns;
        int const splits = known->splits(tiles * columns, (p.in_features + kGemmInputs - 1) / kGemmInputs);
        cudaLaunchAttribute attributes[2] = {};
        auto const config =
            describe_launch(dim3(tiles * splits, columns), Tile::Threads, kShared, splits, stream, attributes);
        return cudaLaunchKernelEx(&config, kKernel, p, weight, gate, activations, splits);
    }
};

// f(Instance{}) for a product.
template <typename F>
cudaError_t dispatch_instance(GemmParams const& p, F&& f) {
    return dispatch_dtype(p.dtype, [&](auto type) {
        using T = decltype(type);
        if (p.gate != nullptr)
            return dispatch_tile<2>(p.num_rows, [&](auto tile) { return f(Instance<T, T, decltype(tile)>{}); });
        return dispatch_tile<1>(p.num_rows, [&](auto tile) {
            using Tile = decltype(tile);
            return p.wide ? f(Instance<T, float, Tile>{}) : f(Instance<T, T, Tile>{});
        });
    });
}

}  // namespace

bool saw_has_gemm(GemmParams const& p) {
    if (p.num_rows > kFewGemmRows || p.in_features % 8 != 0 || p.out_features % 4 != 0) return false;
    bool hopper = false;
    auto const e = dispatch_instance(p, [&](auto instance) {
        SplitLaunch const* known = nullptr;
        auto const e = instance.prepare(known);
        hopper = known->hopper();
        return e;
    });
    return e == cudaSuccess && hopper;
}

cudaError_t saw_gemm(GemmParams const& p, cudaStream_t stream) {
    if (p.num_rows == 0) return cudaSuccess;
    return dispatch_instance(p, [&](auto instance) { return instance.launch(p, stream); });
}

}  // namespace saw
