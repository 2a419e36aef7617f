// The launch of the write with frames.
#pragma once

#include <algorithm>

#include "../launch.cuh"
#include "instances.h"
#include "saw/common/dispatch.h"
#include "saw/rotate_quantize_kv/frame_few.cuh"
#include "saw/rotate_quantize_kv/frame_many_sm90.cuh"

namespace saw {

// Of the current device; they are alike in any machine that serves one engine.
struct FrameDevice {
    int sms = 0;
    bool hopper = false;
};

template <typename Few, typename Many>
cudaError_t prepare_frame(FrameDevice& found) {
    static FrameDevice prepared;
    if (prepared.sms == 0) {
        int device = 0, sms = 0;
        if (auto e = cudaGetDevice(&device)) return e;
        if (auto e = cudaDeviceGetAttribute(&sms, cudaDevAttrMultiProcessorCount, device)) return e;
        constexpr auto kMostShared = cudaFuncAttributeMaxDynamicSharedMemorySize;
        if (auto e = cudaFuncSetAttribute(frame_few_kernel<Few>, kMostShared, int(sizeof(FrameFewTile<Few>)))) return e;
        if constexpr (!std::is_void_v<Many>) {
            cudaFuncAttributes attributes;
            if (auto e = cudaFuncGetAttributes(&attributes, frame_many_kernel<Many>)) return e;
            prepared.hopper = attributes.maxThreadsPerBlock >= Many::kThreads;
            if (prepared.hopper)
                if (auto e =
                        cudaFuncSetAttribute(frame_many_kernel<Many>, kMostShared, int(sizeof(FrameManyShared<Many>))))
                    return e;
        }
        prepared.sms = sms;
    }
    found = prepared;
    return cudaSuccess;
}

// A run of many tiles fetches its matrix seldom; with several runs for each place of a CTA the last ones leave few
// idle.
inline dim3 frame_runs(RotateQuantizeKvParams const& p, int cta_rows, int ctas, FrameGrid& grid) {
    auto const tiles = (p.num_tokens + cta_rows - 1) / cta_rows;  // of K of a head
    long long const all = (long long)tiles * p.pool.num_kv_heads * (grid.group + 2);
    int const tiles_of_run = int(std::clamp(all / (8 * ctas), 1LL, 8LL));
    grid.rows_per_run = tiles_of_run * cta_rows;
    return dim3(grid.group + 2, p.pool.num_kv_heads, (tiles + tiles_of_run - 1) / tiles_of_run);
}

template <int HeadDim, typename T, int KeyBits>
cudaError_t launch_frame_typed(RotateQuantizeKvParams const& p, cudaStream_t stream) {
    using Few = FrameFewConfig<HeadDim, T, KeyBits>;
    using Many = std::conditional_t<(HeadDim <= 128), FrameManyConfig<std::min(HeadDim, 128), T, KeyBits>, void>;
    FrameDevice device;
    if (auto e = prepare_frame<Few, Many>(device)) return e;
    FrameGrid grid{p.num_heads / p.pool.num_kv_heads, 0};
    if constexpr (!std::is_void_v<Many>) {
        // On an H200 and 48 heads: 512 tokens take the many 33 µs and the few 19, 2048 tokens 44 and 58.
        if (device.hopper && p.num_tokens > 1024) {
            auto const runs = frame_runs(p, Many::kCtaRows, device.sms, grid);
            return launch_dependent<&frame_many_kernel<Many>>(runs, Many::kThreads, sizeof(FrameManyShared<Many>),
                                                              stream, p, grid);
        }
    }
    auto const runs = frame_runs(p, Few::kRows, device.sms * Few::kCtasPerSm, grid);
    return launch_dependent<&frame_few_kernel<Few>>(runs, Few::kThreads, sizeof(FrameFewTile<Few>), stream, p, grid);
}

template <int HeadDim>
cudaError_t launch_frame(RotateQuantizeKvParams const& p, cudaStream_t stream) {
    return dispatch_dtype(p.dtype, [&](auto type) {
        using T = decltype(type);
        return key_bits(p.cache) == 8 ? launch_frame_typed<HeadDim, T, 8>(p, stream)
                                      : launch_frame_typed<HeadDim, T, 4>(p, stream);
    });
}

}  // namespace saw
