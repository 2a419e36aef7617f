// The launch of one head_dim's instances.
#pragma once

#include "kv_write.h"
#include "saw/kv_write.cuh"

namespace saw {

template <typename Config>
cudaError_t launch_kv_write_instance(KvWriteParams const& p, cudaStream_t stream) {
    auto const warps_of = [](int heads) { return (heads + Config::kRows - 1) / Config::kRows; };
    int const heads = p.num_heads, kv_heads = p.pool.num_kv_heads;
    int const query_warps = warps_of(heads), kv_warps = warps_of(kv_heads);
    KvWriteGrid grid{};
    grid.groups[kQueryRows] = {p.q_out, heads, 0, 0};
    grid.groups[kKeyRows] = {p.k_out, kv_heads, heads, query_warps};
    grid.groups[kValueRows] = {p.v_out, kv_heads, heads + kv_heads, query_warps + kv_warps};
    grid.rows_per_token = heads + 2 * kv_heads;

    int const warps = query_warps + 2 * kv_warps;
    int const ctas_per_token = (warps + Config::kMaxWarps - 1) / Config::kMaxWarps;
    dim3 const threads(32, (warps + ctas_per_token - 1) / ctas_per_token);
    dim3 const ctas(p.num_tokens, ctas_per_token);
    kv_write_kernel<Config><<<ctas, threads, 0, stream>>>(p, grid);
    return cudaGetLastError();
}

template <int HeadDim, int Order, CacheType Cache, typename T>
cudaError_t launch_kv_write_order(KvWriteParams const& p, cudaStream_t stream) {
    if constexpr (HeadDim % Order != 0) {
        return cudaErrorInvalidValue;
    } else if constexpr (HeadDim == 96) {
        return launch_kv_write_instance<KvWriteConfig<HeadDim, Order, 4, Cache, T>>(p, stream);
    } else {
        // 512 tokens are about what a Hopper GPU holds at once: up to there the time is that of a row's chain.
        return p.num_tokens <= 512
                   ? launch_kv_write_instance<KvWriteConfig<HeadDim, Order, HeadDim / 16, Cache, T>>(p, stream)
                   : launch_kv_write_instance<KvWriteConfig<HeadDim, Order, HeadDim / 32, Cache, T>>(p, stream);
    }
}

template <int HeadDim, typename T>
cudaError_t launch_kv_write_typed(KvWriteParams const& p, cudaStream_t stream) {
    if (p.cache == CacheType::kRaw) {
        if (p.hadamard_order != 1) return cudaErrorInvalidValue;
        return launch_kv_write_order<HeadDim, 1, CacheType::kRaw, T>(p, stream);
    }
    switch (p.hadamard_order) {
        case 1:
            return launch_kv_write_order<HeadDim, 1, CacheType::kInt4, T>(p, stream);
        case 16:
            return launch_kv_write_order<HeadDim, 16, CacheType::kInt4, T>(p, stream);
        case 32:
            return launch_kv_write_order<HeadDim, 32, CacheType::kInt4, T>(p, stream);
        case 64:
            return launch_kv_write_order<HeadDim, 64, CacheType::kInt4, T>(p, stream);
        case 128:
            return launch_kv_write_order<HeadDim, 128, CacheType::kInt4, T>(p, stream);
        case 256:
            return launch_kv_write_order<HeadDim, 256, CacheType::kInt4, T>(p, stream);
        default:
            return cudaErrorInvalidValue;
    }
}

template <int HeadDim>
cudaError_t launch_kv_write(KvWriteParams const& p, cudaStream_t stream) {
    switch (p.dtype) {
        case DType::kFloat16:
            return launch_kv_write_typed<HeadDim, __half>(p, stream);
        case DType::kBFloat16:
            return launch_kv_write_typed<HeadDim, __nv_bfloat16>(p, stream);
        default:
            return cudaErrorInvalidValue;
    }
}

}  // namespace saw
