#include "../launch.cuh"
#include "saw/common/dispatch.h"
#include "saw/silu_mul/kernel.cuh"
#include "saw/silu_mul/params.h"

namespace saw {

namespace {

template <typename T, int N>
cudaError_t launch_silu_mul(void const* a, void const* b, void* y, size_t count, cudaStream_t stream) {
    constexpr int kThreads = 256;
    unsigned const blocks = unsigned((count / N + kThreads - 1) / kThreads);
    return launch_dependent<&silu_mul_kernel<T, N>>(blocks, kThreads, 0, stream, static_cast<T const*>(a),
                                                    static_cast<T const*>(b), static_cast<T*>(y), count);
}

}  // namespace

cudaError_t saw_silu_mul(void const* a, void const* b, void* y, size_t count, DType dtype, cudaStream_t stream) {
    if (count == 0) return cudaSuccess;
    return dispatch_dtype(dtype, [&](auto type) {
        using T = decltype(type);
        return (count % kWide == 0 ? &launch_silu_mul<T, kWide> : &launch_silu_mul<T, 1>)(a, b, y, count, stream);
    });
}

}  // namespace saw
