// The launch of one head_dim's instances, each in the version that the device runs.
#pragma once

#include <algorithm>

#include <cudaTypedefs.h>

#include "prefill_instances.h"
#include "saw/common/dispatch.h"
#include "saw/paged_attention/prefill/pipeline_sm80.cuh"
#include "saw/paged_attention/prefill/pipeline_sm90.cuh"

namespace saw {

// The driver's function, found through the runtime: nothing is linked against libcuda.
inline PFN_cuTensorMapEncodeTiled_v12000 tensor_map_encoder() {
    static auto const function = [] {
        void* found = nullptr;
        cudaDriverEntryPointQueryResult result;
        auto const e =
            cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", &found, 12000, cudaEnableDefault, &result);
        return e == cudaSuccess && result == cudaDriverEntryPointSuccess
                   ? reinterpret_cast<PFN_cuTensorMapEncodeTiled_v12000>(found)
                   : nullptr;
    }();
    return function;
}

// Rows of 16-bit channels, brought 64 channels and box_rows rows at a time.
inline cudaError_t map_rows(CUtensorMap& map, void const* base, uint64_t rows, uint64_t channels, int box_rows,
                            DType dtype) {
    auto* const encode = tensor_map_encoder();
    if (encode == nullptr) return cudaErrorInsufficientDriver;
    uint64_t const shape[2] = {channels, rows}, stride = channels * 2;
    uint32_t const box[2] = {64, uint32_t(box_rows)}, step[2] = {1, 1};
    auto const type = dtype == DType::kFloat16 ? CU_TENSOR_MAP_DATA_TYPE_FLOAT16 : CU_TENSOR_MAP_DATA_TYPE_BFLOAT16;
    auto const result =
        encode(&map, type, 2, const_cast<void*>(base), shape, &stride, box, step, CU_TENSOR_MAP_INTERLEAVE_NONE,
               CU_TENSOR_MAP_SWIZZLE_128B, CU_TENSOR_MAP_L2_PROMOTION_L2_256B, CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
    return result == CUDA_SUCCESS ? cudaSuccess : cudaErrorInvalidValue;
}

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
        return p.cache == CacheType::kInt4 ? launch_prefill_instance<HeadDim, T, CacheType::kInt4>(p, stream)
                                           : launch_prefill_instance<HeadDim, T, CacheType::kUnquantized>(p, stream);
    });
}

}  // namespace saw
