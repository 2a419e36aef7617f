// The launch of one head_dim's instances, each in the version that the device runs.
#pragma once

#include <algorithm>

#include "../tensor_map.h"
#include "prefill_instances.h"
#include "saw/common/dispatch.h"
#include "saw/paged_attention/prefill/pipeline_sm80.cuh"
#include "saw/paged_attention/prefill/pipeline_sm90.cuh"

namespace saw {

// What the current device runs; they are alike in any machine that serves one engine.
struct PrefillDevice {
    int sms = 0;
    bool hopper = false;  // whether its code was compiled for sm_90a
};

// Finds it, and prepares the instance, at the first call.
template <typename Config, typename Sm80Config>
cudaError_t prepare_prefill(PrefillDevice& found) {
    static PrefillDevice prepared;
    if (prepared.sms == 0) {
        int device = 0, major = 0, sms = 0;
        if (auto e = cudaGetDevice(&device)) return e;
        if (auto e = cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device)) return e;
        if (auto e = cudaDeviceGetAttribute(&sms, cudaDevAttrMultiProcessorCount, device)) return e;
        if (major < 8) return cudaErrorNotSupported;
        auto* const kernel = prefill_sm90_kernel<Config>;
        auto* const sm80_kernel = prefill_sm80_kernel<Sm80Config>;
        constexpr auto kMostShared = cudaFuncAttributeMaxDynamicSharedMemorySize;
        cudaFuncAttributes attributes;
        if (auto e = cudaFuncGetAttributes(&attributes, kernel)) return e;
        prepared.hopper = attributes.maxThreadsPerBlock >= Config::kThreads;
        auto const e = prepared.hopper
                           ? cudaFuncSetAttribute(kernel, kMostShared, sizeof(PrefillSm90Shared<Config>))
                           : cudaFuncSetAttribute(sm80_kernel, kMostShared, sizeof(PrefillSm80Shared<Sm80Config>));
        if (e != cudaSuccess) return e;
        prepared.sms = sms;
    }
    found = prepared;
    return cudaSuccess;
}

// Tiles of all KV heads: no more than the step's tokens can fill, whoever they belong to.
inline long long most_prefill_tiles(PrefillParams const& p, int rows) {
    int const tokens = rows / (p.num_heads / p.pool.num_kv_heads);
    return (p.num_tokens + (long long)(p.num_sequences) * (tokens - 1)) / tokens * p.pool.num_kv_heads;
}

template <int HeadDim, typename T, CacheType Cache>
cudaError_t launch_prefill_instance(PrefillParams const& p, cudaStream_t stream) {
    using Config = PrefillSm90Config<HeadDim, T, Cache>;
    using Sm80Config = PrefillSm80Config<HeadDim, T, Cache>;
    PrefillDevice device;
    if (auto e = prepare_prefill<Config, Sm80Config>(device)) return e;
    if (!device.hopper) {
        auto const grid = unsigned(most_prefill_tiles(p, Sm80Config::kRows));
        constexpr int kBytes = sizeof(PrefillSm80Shared<Sm80Config>);
        prefill_sm80_kernel<Sm80Config><<<grid, Sm80Config::kThreads, kBytes, stream>>>(p);
        return cudaGetLastError();
    }
    PrefillMaps maps{};
    uint64_t const channels = uint64_t(p.pool.num_kv_heads) * HeadDim;
    if (auto e = map_rows(maps.k, p.k, p.num_tokens, channels, Config::kTileTokens, p.dtype)) return e;
    if (auto e = map_rows(maps.v, p.v, p.num_tokens, channels, Config::kTileTokens, p.dtype)) return e;
    if (Cache == CacheType::kUnquantized) {
        // How many rows the pool has is nobody's concern: the block table names those that are read.
        uint64_t const rows = uint64_t(1) << 31;
        int const box_rows = std::min(p.pool.tokens_per_block, Config::kTileTokens);
        if (auto e = map_rows(maps.pool, p.pool.base, rows, HeadDim, box_rows, p.dtype)) return e;
    }
    int const grid = int(std::min<long long>(device.sms, most_prefill_tiles(p, Config::kRows)));
    prefill_sm90_kernel<Config><<<grid, Config::kThreads, sizeof(PrefillSm90Shared<Config>), stream>>>(p, maps);
    return cudaGetLastError();
}

template <int HeadDim>
cudaError_t launch_prefill(PrefillParams const& p, cudaStream_t stream) {
    return dispatch_dtype(p.dtype, [&](auto type) {
        using T = decltype(type);
        switch (p.cache) {
            case CacheType::kInt4:
                return launch_prefill_instance<HeadDim, T, CacheType::kInt4>(p, stream);
            case CacheType::kKey8Value4:
                return launch_prefill_instance<HeadDim, T, CacheType::kKey8Value4>(p, stream);
            default:
                return launch_prefill_instance<HeadDim, T, CacheType::kUnquantized>(p, stream);
        }
    });
}

}  // namespace saw
