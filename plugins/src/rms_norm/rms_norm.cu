#include <algorithm>
#include <limits>

#include "../launch.cuh"
#include "saw/common/dispatch.h"
#include "saw/rms_norm/kernel.cuh"
#include "saw/rms_norm/params.h"

namespace saw {

namespace {

template <typename T, int N>
cudaError_t launch_rms_norm(RmsNormParams const& p, cudaStream_t stream) {
    int const threads = std::min((p.width / N + 31) / 32 * 32, 1024);
    return launch_dependent<&rms_norm_kernel<T, N>>(p.num_rows * p.num_heads, threads, 0, stream, p);
}

}  // namespace

cudaError_t saw_rms_norm(RmsNormParams const& p, cudaStream_t stream) {
    if (p.num_rows == 0) return cudaSuccess;
    if (int64_t(p.num_rows) * p.num_heads > std::numeric_limits<int>::max()) return cudaErrorInvalidConfiguration;
    return dispatch_dtype(p.dtype, [&](auto type) {
        using T = decltype(type);
        return (p.width % kWide == 0 ? &launch_rms_norm<T, kWide> : &launch_rms_norm<T, 1>)(p, stream);
    });
}

}  // namespace saw
