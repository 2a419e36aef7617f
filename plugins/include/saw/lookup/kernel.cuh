// The kernel of lookup().
#pragma once

#include <cstddef>
#include <cstdint>

#include <cuda_runtime.h>

namespace saw {

// A block for each token. T is as wide as divides a row.
template <typename T>
__global__ void lookup_kernel(T const* __restrict__ table, int32_t const* __restrict__ rows, T* __restrict__ out,
                              int num_rows, int width) {
    int const row = rows[blockIdx.x];
    bool const inside = row >= 0 && row < num_rows;
    for (int i = threadIdx.x; i < width; i += blockDim.x)
        out[size_t(blockIdx.x) * width + i] = inside ? table[size_t(row) * width + i] : T{};
}

}  // namespace saw
