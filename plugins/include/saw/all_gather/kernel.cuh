// The kernel of all_gather().
#pragma once

#include <cstddef>

#include <cuda_runtime.h>

namespace saw {

// A row of blocks for each row. T is as wide as divides width and out_width, which are counted in it.
template <typename T>
__global__ void all_gather_kernel(T const* __restrict__ parts, T* __restrict__ out, int num_rows, int width,
                                  int out_width) {
    size_t const row = blockIdx.y;
    for (int i = blockIdx.x * blockDim.x + threadIdx.x; i < out_width; i += gridDim.x * blockDim.x)
        out[row * out_width + i] = parts[(size_t(i / width) * num_rows + row) * width + i % width];
}

}  // namespace saw
