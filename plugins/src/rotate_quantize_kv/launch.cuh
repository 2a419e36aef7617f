// The launch of one head_dim's instances.
#pragma once

#include <algorithm>
#include <numeric>

#include "../launch.cuh"
#include "instances.h"
#include "saw/common/dispatch.h"
#include "saw/rotate_quantize_kv/kernel.cuh"

namespace saw {

// How many warps of a staged instance the GPU holds at once.
template <typename Config>
cudaError_t prepare_rotate_quantize_kv(int& max_warps) {
    static int warps = 0;  // of the current device; they are alike in any machine that serves one engine
    if (warps == 0) {
        int device = 0, sms = 0, per_sm = 0;
        if (auto e = cudaGetDevice(&device)) return e;
        if (auto e = cudaDeviceGetAttribute(&sms, cudaDevAttrMultiProcessorCount, device)) return e;
        if (auto e = cudaOccupancyMaxActiveBlocksPerMultiprocessor(&per_sm, rotate_quantize_kv_kernel<Config>,
                                                                   32 * Config::kWarps, 0))
            return e;
        warps = sms * per_sm * Config::kWarps;
    }
    max_warps = warps;
    return cudaSuccess;
}

template <typename Config>
cudaError_t launch_rotate_quantize_kv_instance(RotateQuantizeKvParams const& p, cudaStream_t stream) {
    auto const items_of = [](int heads) { return (heads + Config::kRows - 1) / Config::kRows; };
    int const heads = p.num_heads, kv_heads = p.pool.num_kv_heads;
    int const query_items = items_of(heads), kv_items = items_of(kv_heads);
    int const items_per_token = query_items + 2 * kv_items;
    RotateQuantizeKvGrid grid{};
    grid.groups[kQueryRows] = {p.q_out, heads, 0, 0};
    grid.groups[kKeyRows] = {p.k_out, kv_heads, heads, query_items};
    grid.groups[kValueRows] = {p.v_out, kv_heads, heads + kv_heads, query_items + kv_items};
    grid.chunks_per_token = (heads + 2 * kv_heads) * Config::kChunks;
    grid.block_bytes = int(p.pool.block_bytes());
    grid.head_bytes = int(p.pool.head_bytes());
    grid.items_per_token = items_per_token;
    grid.items_reciprocal = uint32_t(((1ull << 32) + items_per_token - 1) / items_per_token);

    // A stride without a common factor with a token's items gives each warp its share of the costly rows of K.
    long long const items = (long long)p.num_tokens * items_per_token;
    int warps = int(items);
    if constexpr (Config::kStaged) {
        int max_warps = 0;
        if (auto e = prepare_rotate_quantize_kv<Config>(max_warps)) return e;
        if (items > max_warps) {
            warps = max_warps;
            while (std::gcd(warps, items_per_token) > 1) --warps;
        }
    }
    grid.warps = warps;
    grid.token_step = warps / items_per_token;
    grid.item_step = warps % items_per_token;
    int const ctas = (warps + Config::kWarps - 1) / Config::kWarps;
    return launch_dependent<&rotate_quantize_kv_kernel<Config>>(ctas, dim3(32, Config::kWarps), 0, stream, p, grid);
}

template <int HeadDim, int Order, CacheType Cache, typename T>
cudaError_t launch_rotate_quantize_kv_order(RotateQuantizeKvParams const& p, cudaStream_t stream) {
    if constexpr (HeadDim % Order != 0) {
        return cudaErrorInvalidValue;
    } else {
        // Up to about as many tokens as a Hopper GPU has SMs the time is that of a row's chain of instructions; 512 are
        // about what it holds at once.
        constexpr int kFew = HeadDim <= 96 ? 4 : HeadDim / 16, kMany = HeadDim <= 96 ? 4 : HeadDim / 32;
        if (p.num_tokens > 512)
            return launch_rotate_quantize_kv_instance<RotateQuantizeKvConfig<HeadDim, Order, kMany, true, Cache, T>>(
                p, stream);
        return p.num_tokens <= 128
                   ? launch_rotate_quantize_kv_instance<RotateQuantizeKvConfig<HeadDim, Order, kFew, false, Cache, T>>(
                         p, stream)
                   : launch_rotate_quantize_kv_instance<RotateQuantizeKvConfig<HeadDim, Order, kMany, false, Cache, T>>(
                         p, stream);
    }
}

template <int HeadDim, typename T>
cudaError_t launch_rotate_quantize_kv_typed(RotateQuantizeKvParams const& p, cudaStream_t stream) {
    if (p.cache == CacheType::kUnquantized) {
        if (p.hadamard_order != 1) return cudaErrorInvalidValue;
        return launch_rotate_quantize_kv_order<HeadDim, 1, CacheType::kUnquantized, T>(p, stream);
    }
    if (p.cache == CacheType::kKey8Value4) {
        constexpr int kLargest = HeadDim & -HeadDim;
        if (p.hadamard_order != kLargest) return cudaErrorInvalidValue;
        return launch_rotate_quantize_kv_order<HeadDim, kLargest, CacheType::kKey8Value4, T>(p, stream);
    }
    switch (p.hadamard_order) {
        case 1:
            return launch_rotate_quantize_kv_order<HeadDim, 1, CacheType::kInt4, T>(p, stream);
        case 16:
            return launch_rotate_quantize_kv_order<HeadDim, 16, CacheType::kInt4, T>(p, stream);
        case 32:
            return launch_rotate_quantize_kv_order<HeadDim, 32, CacheType::kInt4, T>(p, stream);
        case 64:
            return launch_rotate_quantize_kv_order<HeadDim, 64, CacheType::kInt4, T>(p, stream);
        case 128:
            return launch_rotate_quantize_kv_order<HeadDim, 128, CacheType::kInt4, T>(p, stream);
        case 256:
            return launch_rotate_quantize_kv_order<HeadDim, 256, CacheType::kInt4, T>(p, stream);
        default:
            return cudaErrorInvalidValue;
    }
}

template <int HeadDim>
cudaError_t launch_rotate_quantize_kv(RotateQuantizeKvParams const& p, cudaStream_t stream) {
    return dispatch_dtype(
        p.dtype, [&](auto type) { return launch_rotate_quantize_kv_typed<HeadDim, decltype(type)>(p, stream); });
}

}  // namespace saw
