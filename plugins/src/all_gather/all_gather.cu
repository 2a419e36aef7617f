#include <algorithm>

#include "saw/all_gather/kernel.cuh"
#include "saw/all_gather/params.h"

namespace saw {

namespace {

template <typename T>
void launch_all_gather(float const* parts, float* out, int num_rows, int width, int out_width, cudaStream_t stream) {
    constexpr int kThreads = 256, kPerThread = 4, kNumbers = sizeof(T) / sizeof(float);
    int const wide = out_width / kNumbers;
    dim3 const grid(std::max(1, wide / (kThreads * kPerThread)), num_rows);
    all_gather_kernel<<<grid, kThreads, 0, stream>>>(reinterpret_cast<T const*>(parts), reinterpret_cast<T*>(out),
                                                     num_rows, width / kNumbers, wide);
}

}  // namespace

cudaError_t saw_all_gather(float const* parts, float* out, int num_ranks, int num_rows, int width, int out_width,
                           cudaStream_t stream) {
    if (out_width > num_ranks * width) return cudaErrorInvalidValue;
    if (num_rows == 0) return cudaSuccess;
    bool const is_wide = width % 4 == 0 && out_width % 4 == 0;
    (is_wide ? &launch_all_gather<float4> : &launch_all_gather<float>)(parts, out, num_rows, width, out_width, stream);
    return cudaGetLastError();
}

}  // namespace saw
