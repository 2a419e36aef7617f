// The launch of one head_dim's instances.
#pragma once

#include <algorithm>

#include "decode_attention.h"
#include "saw/decode_attention.cuh"

namespace saw {

// Chosen by measurement on an H200. Few CTAs of an SM leave a warp the registers to
// work on 32 tokens at a time, and large tiles make a barrier's cost small.
template <int HeadDim, int QueryTiles>
struct DecodeChoice;
// head_dim, query tiles, tile tokens, together, stages, CTAs per SM
template <>
struct DecodeChoice<64, 1> {
    using Config = DecodeConfig<64, 1, 256, 2, 3, 3>;
};
template <>
struct DecodeChoice<96, 1> {
    using Config = DecodeConfig<96, 1, 256, 2, 2, 3>;
};
template <>
struct DecodeChoice<128, 1> {
    using Config = DecodeConfig<128, 1, 256, 2, 2, 3>;
};
template <>
struct DecodeChoice<256, 1> {
    using Config = DecodeConfig<256, 1, 128, 1, 2, 3>;
};
template <>
struct DecodeChoice<64, 2> {
    using Config = DecodeConfig<64, 2, 256, 1, 3, 3>;
};
template <>
struct DecodeChoice<96, 2> {
    using Config = DecodeConfig<96, 2, 256, 1, 2, 3>;
};
template <>
struct DecodeChoice<128, 2> {
    using Config = DecodeConfig<128, 2, 256, 1, 2, 3>;
};
template <>
struct DecodeChoice<256, 2> {
    using Config = DecodeConfig<256, 2, 128, 1, 2, 2>;
};

template <int HeadDim, int QueryTiles>
using DecodeConfigFor = typename DecodeChoice<HeadDim, QueryTiles>::Config;

template <typename Config, typename T>
cudaError_t prepare_decode(int& max_ctas) {
    static int ctas = 0;  // of the current device; they are alike in any machine that serves one engine
    if (ctas == 0) {
        auto* const kernel = decode_kernel<Config, T>;
        int const bytes = sizeof(DecodeShared<Config>);
        int device = 0, sms = 0, per_sm = 0;
        if (auto e = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, bytes)) return e;
        if (auto e = cudaGetDevice(&device)) return e;
        if (auto e = cudaDeviceGetAttribute(&sms, cudaDevAttrMultiProcessorCount, device)) return e;
        if (auto e = cudaOccupancyMaxActiveBlocksPerMultiprocessor(&per_sm, kernel, Config::kThreads, bytes)) return e;
        ctas = sms * per_sm;
    }
    max_ctas = ctas;
    return cudaSuccess;
}

template <typename Config, typename T>
cudaError_t launch_decode_instance(DecodeParams const& p, cudaStream_t stream) {
    int max_ctas = 0;
    if (auto e = prepare_decode<Config, T>(max_ctas)) return e;
    int const group = p.num_heads / p.pool.num_kv_heads;
    auto* const partials = static_cast<float*>(p.workspace);
    auto* const counters = reinterpret_cast<int*>(partials + size_t(2) * max_ctas * partial_floats<Config>(group));
    // No more CTAs than the longest sequences that the block table can name would fill.
    long long const tokens = (long long)p.pool.max_blocks_per_seq * p.pool.tokens_per_block;
    long long const tiles = (tokens + Config::kTileTokens - 1) / Config::kTileTokens * p.num_sequences;
    int const heads = p.pool.num_kv_heads;
    if (heads > max_ctas) return cudaErrorInvalidConfiguration;
    int const grid = heads * int(std::max(1LL, std::min<long long>(max_ctas / heads, tiles)));
    decode_kernel<Config, T><<<grid, Config::kThreads, sizeof(DecodeShared<Config>), stream>>>(p, partials, counters);
    return cudaGetLastError();
}

template <int HeadDim>
int decode_max_ctas(int group) {
    int ctas = 0;
    auto const e = group <= 8 ? prepare_decode<DecodeConfigFor<HeadDim, 1>, __half>(ctas)
                              : prepare_decode<DecodeConfigFor<HeadDim, 2>, __half>(ctas);
    return e == cudaSuccess ? ctas : 0;
}

template <int HeadDim>
cudaError_t launch_decode(DecodeParams const& p, cudaStream_t stream) {
    bool const one = p.num_heads / p.pool.num_kv_heads <= 8;
    switch (p.dtype) {
        case DType::kFloat16:
            return one ? launch_decode_instance<DecodeConfigFor<HeadDim, 1>, __half>(p, stream)
                       : launch_decode_instance<DecodeConfigFor<HeadDim, 2>, __half>(p, stream);
        case DType::kBFloat16:
            return one ? launch_decode_instance<DecodeConfigFor<HeadDim, 1>, __nv_bfloat16>(p, stream)
                       : launch_decode_instance<DecodeConfigFor<HeadDim, 2>, __nv_bfloat16>(p, stream);
        default:
            return cudaErrorInvalidValue;
    }
}

}  // namespace saw
