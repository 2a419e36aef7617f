// The kernel of rms_norm().
#pragma once

#include "saw/common/ptx.cuh"
#include "saw/common/vec.cuh"
#include "saw/rms_norm/params.h"

namespace saw {

__device__ inline float sum_of_block(float x) {
    __shared__ float sums[32];
    for (int i = 16; i > 0; i /= 2) x += __shfl_xor_sync(~0u, x, i);
    if (threadIdx.x % 32 == 0) sums[threadIdx.x / 32] = x;
    __syncthreads();
    x = threadIdx.x % 32 < blockDim.x / 32 ? sums[threadIdx.x % 32] : 0.0f;
    for (int i = 16; i > 0; i /= 2) x += __shfl_xor_sync(~0u, x, i);
    return x;
}

// A block for each head of each row. A thread reads again what it has summed up, which it finds in L1.
template <typename T, int N>
__global__ void rms_norm_kernel(RmsNormParams p) {
    allow_next_grid();  // a product, whose weights are copied meanwhile
    wait_for_last_grid();
    using P = Pack<T, N>;
    size_t const begin = size_t(blockIdx.x) * p.width;
    auto const at = [&](void const* tensor) {
        return reinterpret_cast<P*>(static_cast<T*>(const_cast<void*>(tensor)) + begin);
    };
    int const packs = p.width / N;
    float square = 0.0f;
    for (int i = threadIdx.x; i < packs; i += blockDim.x) {
        P x = at(p.x)[i];
        if (p.residual != nullptr) {
            P const other = at(p.residual)[i];
            for (int j = 0; j < N; ++j) x.at[j] = from_float<T>(to_float(x.at[j]) + to_float(other.at[j]));
            at(p.sum)[i] = x;
        }
        for (int j = 0; j < N; ++j) square += to_float(x.at[j]) * to_float(x.at[j]);
    }
    int const head = int(blockIdx.x % p.num_heads);
    bool const normed = head < p.num_normed;
    float const scale = rsqrtf(sum_of_block(square) / float(p.width) + p.epsilon);
    float const* const weight = p.weight + size_t(normed ? head : 0) * p.width;
    P const* const rows = at(p.residual != nullptr ? p.sum : p.x);
    for (int i = threadIdx.x; i < packs; i += blockDim.x) {
        P y = rows[i];
        for (int j = 0; normed && j < N; ++j) y.at[j] = from_float<T>(to_float(y.at[j]) * scale * weight[i * N + j]);
        at(p.y)[i] = y;
    }
}

}  // namespace saw
