// The kernel of silu_mul().
#pragma once

#include "saw/common/vec.cuh"
#include "saw/silu_mul/params.h"

namespace saw {

template <typename T, int N>
__global__ void silu_mul_kernel(T const* a, T const* b, T* y, size_t count) {
    using P = Pack<T, N>;
    size_t const i = size_t(blockIdx.x) * blockDim.x + threadIdx.x;
    if (i >= count / N) return;
    P left = reinterpret_cast<P const*>(a)[i];
    P const right = reinterpret_cast<P const*>(b)[i];
    for (int j = 0; j < N; ++j) {
        float const x = to_float(left.at[j]);
        left.at[j] = from_float<T>(x / (1.0f + __expf(-x)) * to_float(right.at[j]));
    }
    reinterpret_cast<P*>(y)[i] = left;
}

}  // namespace saw
