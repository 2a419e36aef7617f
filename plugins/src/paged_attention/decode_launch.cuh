// The launch of one head_dim's instances.
#pragma once

#include <algorithm>

#include "decode_instances.h"
#include "saw/common/dispatch.h"
#include "saw/paged_attention/decode/pipeline_sm80.cuh"
#include "saw/paged_attention/decode/pipeline_sm90.cuh"

namespace saw {

// Rows of codes on Hopper. Chosen by measurement on an H200; of keys of 8 bits, which make a tile half as large again,
// at head_dim 128. Large groups of those have no instance for few sequences: each is compiled for seconds. Few CTAs of
// an SM leave a warp the registers to work on 32 tokens at a time, and large tiles make a barrier's cost small. Q and
// the output of 16 heads of 256 are more than a thread's registers: those take two CTAs that load their tiles
// themselves.
template <CacheType Cache, int HeadDim, int QueryTiles>
struct DecodeSm90Choice;
// head_dim, query tiles, tile tokens, together, stages, CTAs per SM
template <>
struct DecodeSm90Choice<CacheType::kInt4, 64, 1> {
    template <bool Few>
    using Config = DecodeSm90Config<64, 1, 256, 2, 2, 4, Few>;
};
template <>
struct DecodeSm90Choice<CacheType::kInt4, 96, 1> {
    template <bool Few>
    using Config = DecodeSm90Config<96, 1, 256, 2, 2, 3, Few>;
};
template <>
struct DecodeSm90Choice<CacheType::kInt4, 128, 1> {
    template <bool Few>
    using Config = DecodeSm90Config<128, 1, 256, 2, 2, 3, Few>;
};
template <>
struct DecodeSm90Choice<CacheType::kInt4, 256, 1> {
    template <bool Few>
    using Config = DecodeSm90Config<256, 1, 128, 2, 3, 2, Few>;
};
template <>
struct DecodeSm90Choice<CacheType::kInt4, 64, 2> {
    template <bool Few>
    using Config = DecodeSm90Config<64, 2, 256, 1, 3, 3, Few>;
};
template <>
struct DecodeSm90Choice<CacheType::kInt4, 96, 2> {
    template <bool Few>
    using Config = DecodeSm90Config<96, 2, 256, 1, 3, 2, Few>;
};
template <>
struct DecodeSm90Choice<CacheType::kInt4, 128, 2> {
    template <bool Few>
    using Config = DecodeSm90Config<128, 2, 256, 1, 3, 2, Few>;
};
template <>
struct DecodeSm90Choice<CacheType::kKey8Value4, 64, 1> {
    template <bool Few>
    using Config = DecodeSm90Config<64, 1, 256, 2, 2, 4, Few, 8>;
};
template <>
struct DecodeSm90Choice<CacheType::kKey8Value4, 96, 1> {
    template <bool Few>
    using Config = DecodeSm90Config<96, 1, 256, 2, 2, 2, Few, 8>;
};
template <>
struct DecodeSm90Choice<CacheType::kKey8Value4, 128, 1> {
    template <bool Few>
    using Config = DecodeSm90Config<128, 1, 256, 2, 2, 2, Few, 8>;
};
template <>
struct DecodeSm90Choice<CacheType::kKey8Value4, 256, 1> {
    template <bool Few>
    using Config = DecodeSm90Config<256, 1, 128, 2, 2, 2, Few, 8>;
};
template <>
struct DecodeSm90Choice<CacheType::kKey8Value4, 64, 2> {
    template <bool>
    using Config = DecodeSm90Config<64, 2, 256, 1, 2, 3, false, 8>;
};
template <>
struct DecodeSm90Choice<CacheType::kKey8Value4, 96, 2> {
    template <bool>
    using Config = DecodeSm90Config<96, 2, 256, 1, 2, 2, false, 8>;
};
template <>
struct DecodeSm90Choice<CacheType::kKey8Value4, 128, 2> {
    template <bool>
    using Config = DecodeSm90Config<128, 2, 256, 1, 2, 2, false, 8>;
};

// How an instance of pipeline_sm80.cuh uses an SM. A CTA's shared memory, warps * stages * tile, stays below the 99 KiB
// of sm_89.
struct DecodeSm80Shape {
    int tile_tokens;  // of a warp
    int stages;
    int warps;
    int ctas_per_sm;
};

template <CacheType Cache, int HeadDim, int QueryTiles>
constexpr DecodeSm80Shape kDecodeSm80Shape{};
template <>
inline constexpr DecodeSm80Shape kDecodeSm80Shape<CacheType::kUnquantized, 64, 1>{16, 4, 4, 3};
template <>
inline constexpr DecodeSm80Shape kDecodeSm80Shape<CacheType::kUnquantized, 64, 2>{16, 4, 4, 3};
template <>
inline constexpr DecodeSm80Shape kDecodeSm80Shape<CacheType::kUnquantized, 96, 1>{16, 3, 4, 3};
template <>
inline constexpr DecodeSm80Shape kDecodeSm80Shape<CacheType::kUnquantized, 96, 2>{16, 3, 4, 3};
template <>
inline constexpr DecodeSm80Shape kDecodeSm80Shape<CacheType::kUnquantized, 128, 1>{16, 3, 4, 2};
template <>
inline constexpr DecodeSm80Shape kDecodeSm80Shape<CacheType::kUnquantized, 128, 2>{16, 3, 4, 2};
template <>
inline constexpr DecodeSm80Shape kDecodeSm80Shape<CacheType::kUnquantized, 256, 1>{16, 3, 2, 2};
template <>
inline constexpr DecodeSm80Shape kDecodeSm80Shape<CacheType::kInt4, 64, 1>{64, 3, 4, 3};
template <>
inline constexpr DecodeSm80Shape kDecodeSm80Shape<CacheType::kInt4, 64, 2>{64, 3, 4, 2};
template <>
inline constexpr DecodeSm80Shape kDecodeSm80Shape<CacheType::kInt4, 96, 1>{64, 2, 4, 3};
template <>
inline constexpr DecodeSm80Shape kDecodeSm80Shape<CacheType::kInt4, 96, 2>{64, 2, 4, 2};
template <>
inline constexpr DecodeSm80Shape kDecodeSm80Shape<CacheType::kInt4, 128, 1>{64, 2, 4, 3};
template <>
inline constexpr DecodeSm80Shape kDecodeSm80Shape<CacheType::kInt4, 128, 2>{64, 2, 4, 2};
template <>
inline constexpr DecodeSm80Shape kDecodeSm80Shape<CacheType::kInt4, 256, 1>{32, 2, 4, 3};
template <>
inline constexpr DecodeSm80Shape kDecodeSm80Shape<CacheType::kKey8Value4, 64, 1>{64, 3, 4, 2};
template <>
inline constexpr DecodeSm80Shape kDecodeSm80Shape<CacheType::kKey8Value4, 64, 2>{64, 3, 4, 2};
template <>
inline constexpr DecodeSm80Shape kDecodeSm80Shape<CacheType::kKey8Value4, 96, 1>{64, 2, 4, 2};
template <>
inline constexpr DecodeSm80Shape kDecodeSm80Shape<CacheType::kKey8Value4, 96, 2>{64, 2, 4, 2};
template <>
inline constexpr DecodeSm80Shape kDecodeSm80Shape<CacheType::kKey8Value4, 128, 1>{32, 3, 4, 2};
template <>
inline constexpr DecodeSm80Shape kDecodeSm80Shape<CacheType::kKey8Value4, 128, 2>{64, 2, 2, 2};
template <>
inline constexpr DecodeSm80Shape kDecodeSm80Shape<CacheType::kKey8Value4, 256, 1>{32, 2, 4, 2};

template <CacheType Cache, int HeadDim, int QueryTiles, typename T>
struct DecodeSm80Instance {
    static constexpr DecodeSm80Shape kShape = kDecodeSm80Shape<Cache, HeadDim, QueryTiles>;
    using Rows = std::conditional_t<Cache == CacheType::kUnquantized, Rows16Bit<T, HeadDim, QueryTiles>,
                                    Int4Rows<T, HeadDim, QueryTiles, QueryTiles == 1 ? 2 : 1, key_bits(Cache)>>;
    using Config = DecodeSm80Config<Rows, kShape.tile_tokens, kShape.stages, kShape.warps, kShape.ctas_per_sm>;
};

// CTAs that the current device holds at a time.
template <typename Kernel>
cudaError_t prepare_decode(Kernel* kernel, int threads, int shared_bytes, int& max_ctas) {
    int device = 0, sms = 0, per_sm = 0;
    if (auto e = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, shared_bytes)) return e;
    if (auto e = cudaGetDevice(&device)) return e;
    if (auto e = cudaDeviceGetAttribute(&sms, cudaDevAttrMultiProcessorCount, device)) return e;
    if (auto e = cudaOccupancyMaxActiveBlocksPerMultiprocessor(&per_sm, kernel, threads, shared_bytes)) return e;
    max_ctas = sms * per_sm;
    return cudaSuccess;
}

// The instances of pipeline_sm90.cuh for few and short sequences, and for all others.
template <typename Choice, typename T>
struct DecodeSm90Launch {
    static cudaError_t max_ctas(int& ctas) {
        int few = 0;
        if (auto e = max_ctas_of<typename Choice::template Config<false>>(ctas)) return e;
        if (auto e = max_ctas_of<typename Choice::template Config<true>>(few)) return e;
        ctas = std::min(ctas, few);
        return cudaSuccess;
    }

    static cudaError_t launch(DecodeParams const& p, float* partials, int* counters, int ctas, cudaStream_t stream) {
        int const heads = p.pool.num_kv_heads;
        if (heads > ctas) return cudaErrorInvalidConfiguration;
        // Of the longest sequences that the block table can name: the lengths themselves only the GPU knows.
        constexpr int kTile = Choice::template Config<true>::kTileTokens;
        long long const tokens = (long long)p.pool.max_blocks_per_seq * p.pool.tokens_per_block;
        long long const tiles = (tokens + kTile - 1) / kTile * p.num_sequences;
        int const splits = ctas / heads;
        // No more CTAs than they would fill.
        int const grid = heads * int(std::max(1LL, std::min<long long>(splits, tiles)));
        // As many splits for each sequence leave some CTAs idle, and a long work list wants all.
        bool const even = p.num_sequences > 1 && splits % p.num_sequences < splits / 8;
        bool const few =
            p.num_sequences <= splits && tiles > splits && (even || tiles <= (long long)kShortShare * splits);
        if (few) return launch<typename Choice::template Config<true>>(p, partials, counters, grid, stream);
        return launch<typename Choice::template Config<false>>(p, partials, counters, grid, stream);
    }

  private:
    // Tiles of a split up to which what is done once takes more time than reading.
    static constexpr int kShortShare = 3;

    template <typename Config>
    static cudaError_t max_ctas_of(int& ctas) {
        static int known = 0;  // of the current device; they are alike in any machine that serves one engine
        if (known == 0)
            if (auto e = prepare_decode(decode_sm90_kernel<Config, T>, Config::kThreads,
                                        sizeof(DecodeSm90Shared<Config>), known))
                return e;
        ctas = known;
        return cudaSuccess;
    }

    template <typename Config>
    static cudaError_t launch(DecodeParams const& p, float* partials, int* counters, int grid, cudaStream_t stream) {
        decode_sm90_kernel<Config, T>
            <<<grid, Config::kThreads, sizeof(DecodeSm90Shared<Config>), stream>>>(p, partials, counters);
        return cudaGetLastError();
    }
};

// An instance of pipeline_sm80.cuh.
template <typename Config>
struct DecodeSm80Launch {
    // Tokens that make a split of their own worthwhile.
    static constexpr int kMinSplitTokens = 256;

    static cudaError_t max_ctas(int& ctas) {
        static int known = 0;
        if (known == 0)
            if (auto e = prepare_decode(decode_sm80_kernel<Config>, Config::kThreads, sizeof(DecodeSm80Shared<Config>),
                                        known))
                return e;
        ctas = known;
        return cudaSuccess;
    }

    static cudaError_t launch(DecodeParams const& p, float* partials, int* counters, int ctas, cudaStream_t stream) {
        int const heads = p.pool.num_kv_heads, group = p.num_heads / heads;
        int const ctas_per_group = (group + Config::kMaxQueries - 1) / Config::kMaxQueries;
        int const columns = heads * ctas_per_group;
        if (columns > ctas) return cudaErrorInvalidConfiguration;
        long long const tokens = (long long)p.pool.max_blocks_per_seq * p.pool.tokens_per_block * p.num_sequences;
        long long const most = (tokens + kMinSplitTokens - 1) / kMinSplitTokens;
        int const splits = int(std::max(1LL, std::min<long long>(ctas / columns, most)));
        dim3 const grid(ctas_per_group, heads, splits);
        decode_sm80_kernel<Config><<<grid, Config::kThreads, sizeof(DecodeSm80Shared<Config>), stream>>>(
            p, partials, counters, kMinSplitTokens / Config::kTileTokens);
        return cudaGetLastError();
    }
};

// Calls f with the instance for a cache that the parameters choose.
template <CacheType Cache, int HeadDim, typename T, typename F>
auto with_instance_for(int group, bool hopper, F&& f) {
    constexpr int kMostTiles = HeadDim < 256 ? 2 : 1;
    if constexpr (Cache != CacheType::kUnquantized) {
        if (hopper) {
            if (group <= 8) return f(DecodeSm90Launch<DecodeSm90Choice<Cache, HeadDim, 1>, T>{});
            if constexpr (kMostTiles == 2) return f(DecodeSm90Launch<DecodeSm90Choice<Cache, HeadDim, 2>, T>{});
        }
    }
    return group <= 8 ? f(DecodeSm80Launch<typename DecodeSm80Instance<Cache, HeadDim, 1, T>::Config>{})
                      : f(DecodeSm80Launch<typename DecodeSm80Instance<Cache, HeadDim, kMostTiles, T>::Config>{});
}

// Calls f with the instance that the parameters choose.
template <int HeadDim, typename T, typename F>
auto with_decode_instance(CacheType cache, int group, bool hopper, F&& f) {
    switch (cache) {
        case CacheType::kInt4:
            return with_instance_for<CacheType::kInt4, HeadDim, T>(group, hopper, f);
        case CacheType::kKey8Value4:
            return with_instance_for<CacheType::kKey8Value4, HeadDim, T>(group, hopper, f);
        default:
            return with_instance_for<CacheType::kUnquantized, HeadDim, T>(group, hopper, f);
    }
}

// Whether what runs here was compiled for bulk copies, on an SM with Hopper's shared memory: that of sm_120 has less
// than the tiles take.
template <int HeadDim>
cudaError_t has_hopper_code(bool& hopper) {
    static int version = 0, shared_bytes = 0;
    if (version == 0) {
        cudaFuncAttributes attributes{};
        using Config = typename DecodeSm90Choice<CacheType::kInt4, HeadDim, 1>::template Config<false>;
        int device = 0;
        if (auto e = cudaGetDevice(&device)) return e;
        if (auto e = cudaDeviceGetAttribute(&shared_bytes, cudaDevAttrMaxSharedMemoryPerBlockOptin, device)) return e;
        if (auto e = cudaFuncGetAttributes(&attributes, decode_sm90_kernel<Config, __half>)) return e;
        version = attributes.ptxVersion;
    }
    constexpr int kHopperSharedBytes = 227 * 1024;
    hopper = version >= 90 && shared_bytes >= kHopperSharedBytes;
    return cudaSuccess;
}

// CTAs of the instance that needs the most workspace: of any cache, and either dtype.
template <int HeadDim>
int decode_max_ctas(int group) {
    bool hopper = false;
    if (has_hopper_code<HeadDim>(hopper)) return 0;
    int most = 0;
    for (auto const cache : {CacheType::kInt4, CacheType::kUnquantized, CacheType::kKey8Value4}) {
        int ctas = 0;
        auto const prepare = [&](auto instance) { return instance.max_ctas(ctas); };
        for (auto const e : {with_decode_instance<HeadDim, __half>(cache, group, hopper, prepare),
                             with_decode_instance<HeadDim, __nv_bfloat16>(cache, group, hopper, prepare)}) {
            if (e != cudaSuccess) return 0;
            most = std::max(most, ctas);
        }
    }
    return most;
}

template <int HeadDim>
cudaError_t launch_decode(DecodeParams const& p, cudaStream_t stream) {
    bool hopper = false;
    if (auto e = has_hopper_code<HeadDim>(hopper)) return e;
    int const group = p.num_heads / p.pool.num_kv_heads;
    size_t const bytes = decode_partials_bytes(decode_max_ctas<HeadDim>(group), group, HeadDim);
    auto* const partials = static_cast<float*>(p.workspace);
    auto* const counters =
        p.counters != nullptr ? p.counters : reinterpret_cast<int*>(static_cast<uint8_t*>(p.workspace) + bytes);
    auto const launch = [&](auto instance) {
        int ctas = 0;
        if (auto e = instance.max_ctas(ctas)) return e;
        return instance.launch(p, partials, counters, ctas, stream);
    };
    return dispatch_dtype(p.dtype, [&](auto type) {
        return with_decode_instance<HeadDim, decltype(type)>(p.cache, group, hopper, launch);
    });
}

}  // namespace saw
