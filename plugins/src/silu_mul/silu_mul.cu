#include "saw/silu_mul/kernel.cuh"
#include "saw/silu_mul/params.h"

namespace saw {

namespace {

template <typename T, int N>
void launch_silu_mul(void const* a, void const* b, void* y, size_t count, cudaStream_t stream) {
    constexpr int kThreads = 256;
    unsigned const blocks = unsigned((count / N + kThreads - 1) / kThreads);
    silu_mul_kernel<T, N><<<blocks, kThreads, 0, stream>>>(static_cast<T const*>(a), static_cast<T const*>(b),
                                                           static_cast<T*>(y), count);
}

}  // namespace

cudaError_t silu_mul(void const* a, void const* b, void* y, size_t count, DType dtype, cudaStream_t stream) {
    if (count == 0) return cudaSuccess;
    bool const half = dtype == DType::kFloat16, packed = count % kWide == 0;
    auto* const launch = half ? (packed ? &launch_silu_mul<__half, kWide> : &launch_silu_mul<__half, 1>)
                              : (packed ? &launch_silu_mul<__nv_bfloat16, kWide> : &launch_silu_mul<__nv_bfloat16, 1>);
    launch(a, b, y, count, stream);
    return cudaGetLastError();
}

}  // namespace saw
