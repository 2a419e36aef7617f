// The kernel of silu_mul().
#pragma once

#include "saw/common/ptx.cuh"
#include "saw/common/vec.cuh"
#include "saw/silu_mul/params.h"
#include "saw/silu_mul/silu.cuh"

namespace saw {

template <typename T, int N>
__global__ void silu_mul_kernel(T const* a, T const* b, T* y, size_t count) {
    wait_for_last_grid();
    allow_next_grid();
    using P = Pack<T, N>;
    size_t const i = size_t(blockIdx.x) * blockDim.x + threadIdx.x;
    if (i >= count / N) return;
    P left = reinterpret_cast<P const*>(a)[i];
    P const right = reinterpret_cast<P const*>(b)[i];
    for (int j = 0; j < N; ++j) {
        left.at[j] = from_float<T>(silu(to_float(left.at[j])) * to_float(right.at[j]));
    }
    reinterpret_cast<P*>(y)[i] = left;
}

}  // namespace saw
