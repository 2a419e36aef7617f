// The launch of the write with frames.
#pragma once

#include <algorithm>

#include "instances.h"
#include "saw/common/dispatch.h"
#include "saw/rotate_quantize_kv/frame.cuh"

namespace saw {

// How many CTAs the GPU holds at once, and leave to take their shared memory.
template <typename Config>
cudaError_t prepare_frame(int& max_ctas) {
    static int ctas = 0;  // of the current device; they are alike in any machine that serves one engine
    if (ctas == 0) {
        int device = 0, sms = 0;
        if (auto e = cudaGetDevice(&device)) return e;
        if (auto e = cudaDeviceGetAttribute(&sms, cudaDevAttrMultiProcessorCount, device)) return e;
        if (auto e = cudaFuncSetAttribute(frame_kernel<Config>, cudaFuncAttributeMaxDynamicSharedMemorySize,
                                          int(sizeof(FrameTile<Config>))))
            return e;
        ctas = sms * Config::kCtasPerSm;
    }
    max_ctas = ctas;
    return cudaSuccess;
}

template <typename Config>
cudaError_t launch_frame_instance(RotateQuantizeKvParams const& p, cudaStream_t stream) {
    int max_ctas = 0;
    if (auto e = prepare_frame<Config>(max_ctas)) return e;
    int const group = p.num_heads / p.pool.num_kv_heads;
    int const tiles = (p.num_tokens + Config::kRows - 1) / Config::kRows;  // of K of a head
    // A run of many tiles fetches its matrix seldom; with four CTAs for each place the last ones leave few idle.
    long long const all = (long long)tiles * p.pool.num_kv_heads * (group + 2);
    int const tiles_per_run = int(std::clamp(all / (4 * max_ctas), 1LL, 16LL));
    dim3 const ctas(group + 2, p.pool.num_kv_heads, (tiles + tiles_per_run - 1) / tiles_per_run);
    frame_kernel<Config><<<ctas, Config::kThreads, sizeof(FrameTile<Config>), stream>>>(p, {group, tiles_per_run});
    return cudaGetLastError();
}

template <int HeadDim>
cudaError_t launch_frame(RotateQuantizeKvParams const& p, cudaStream_t stream) {
    return dispatch_dtype(
        p.dtype, [&](auto type) { return launch_frame_instance<FrameConfig<HeadDim, decltype(type)>>(p, stream); });
}

}  // namespace saw
