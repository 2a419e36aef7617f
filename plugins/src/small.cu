// What a decoder has beside its GEMMs and its attention: rows of a table, norms, the gate.
#include <algorithm>
#include <limits>

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include "saw/ops.h"

namespace saw {

namespace {

__device__ float wide(__half x) { return __half2float(x); }
__device__ float wide(__nv_bfloat16 x) { return __bfloat162float(x); }
__device__ void narrow(float x, __half& y) { y = __float2half_rn(x); }
__device__ void narrow(float x, __nv_bfloat16& y) { y = __float2bfloat16_rn(x); }

// So many numbers as a thread moves at once.
template <typename T, int N>
struct alignas(N * sizeof(T)) Pack {
    T at[N];
};
constexpr int kWide = 8;

// A block for each token. T is as wide as divides a row.
template <typename T>
__global__ void lookup_kernel(T const* __restrict__ table, int32_t const* __restrict__ rows, T* __restrict__ out,
                              int num_rows, int width) {
    int const row = rows[blockIdx.x];
    bool const inside = row >= 0 && row < num_rows;
    for (int i = threadIdx.x; i < width; i += blockDim.x)
        out[size_t(blockIdx.x) * width + i] = inside ? table[size_t(row) * width + i] : T{};
}

template <typename T>
void launch_lookup(void const* table, int32_t const* rows, void* out, int num_tokens, int num_rows, size_t row_bytes,
                   cudaStream_t stream) {
    int const width = int(row_bytes / sizeof(T)), threads = std::min((width + 31) / 32 * 32, 512);
    lookup_kernel<<<num_tokens, threads, 0, stream>>>(static_cast<T const*>(table), rows, static_cast<T*>(out),
                                                      num_rows, width);
}

__device__ float sum_of_block(float x) {
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
            for (int j = 0; j < N; ++j) narrow(wide(x.at[j]) + wide(other.at[j]), x.at[j]);
            at(p.sum)[i] = x;
        }
        for (int j = 0; j < N; ++j) square += wide(x.at[j]) * wide(x.at[j]);
    }
    int const head = int(blockIdx.x % p.num_heads);
    bool const normed = head < p.num_normed;
    float const scale = rsqrtf(sum_of_block(square) / float(p.width) + p.epsilon);
    float const* const weight = p.weight + size_t(normed ? head : 0) * p.width;
    P const* const rows = at(p.residual != nullptr ? p.sum : p.x);
    for (int i = threadIdx.x; i < packs; i += blockDim.x) {
        P y = rows[i];
        for (int j = 0; normed && j < N; ++j) narrow(wide(y.at[j]) * scale * weight[i * N + j], y.at[j]);
        at(p.y)[i] = y;
    }
}

template <typename T, int N>
__global__ void silu_mul_kernel(T const* a, T const* b, T* y, size_t count) {
    using P = Pack<T, N>;
    size_t const i = size_t(blockIdx.x) * blockDim.x + threadIdx.x;
    if (i >= count / N) return;
    P left = reinterpret_cast<P const*>(a)[i];
    P const right = reinterpret_cast<P const*>(b)[i];
    for (int j = 0; j < N; ++j) {
        float const x = wide(left.at[j]);
        narrow(x / (1.0f + __expf(-x)) * wide(right.at[j]), left.at[j]);
    }
    reinterpret_cast<P*>(y)[i] = left;
}

template <typename T, int N>
void launch_rms_norm(RmsNormParams const& p, cudaStream_t stream) {
    int const threads = std::min((p.width / N + 31) / 32 * 32, 1024);
    rms_norm_kernel<T, N><<<p.num_rows * p.num_heads, threads, 0, stream>>>(p);
}

template <typename T, int N>
void launch_silu_mul(void const* a, void const* b, void* y, size_t count, cudaStream_t stream) {
    constexpr int kThreads = 256;
    unsigned const blocks = unsigned((count / N + kThreads - 1) / kThreads);
    silu_mul_kernel<T, N><<<blocks, kThreads, 0, stream>>>(static_cast<T const*>(a), static_cast<T const*>(b),
                                                           static_cast<T*>(y), count);
}

}  // namespace

cudaError_t lookup(void const* table, int32_t const* rows, void* out, int num_tokens, int num_rows, int width,
                   cudaStream_t stream) {
    if (num_tokens == 0) return cudaSuccess;
    size_t const row_bytes = size_t(width) * 2;
    auto* const of_width = row_bytes % 16 == 0 ? &launch_lookup<uint4> : &launch_lookup<uint16_t>;
    of_width(table, rows, out, num_tokens, num_rows, row_bytes, stream);
    return cudaGetLastError();
}

cudaError_t rms_norm(RmsNormParams const& p, cudaStream_t stream) {
    if (p.num_rows == 0) return cudaSuccess;
    if (int64_t(p.num_rows) * p.num_heads > std::numeric_limits<int>::max()) return cudaErrorInvalidConfiguration;
    bool const half = p.dtype == DType::kFloat16, packed = p.width % kWide == 0;
    auto* const launch = half ? (packed ? &launch_rms_norm<__half, kWide> : &launch_rms_norm<__half, 1>)
                              : (packed ? &launch_rms_norm<__nv_bfloat16, kWide> : &launch_rms_norm<__nv_bfloat16, 1>);
    launch(p, stream);
    return cudaGetLastError();
}

cudaError_t silu_mul(void const* a, void const* b, void* y, size_t count, DType dtype, cudaStream_t stream) {
    if (count == 0) return cudaSuccess;
    bool const half = dtype == DType::kFloat16, packed = count % kWide == 0;
    auto* const launch = half ? (packed ? &launch_silu_mul<__half, kWide> : &launch_silu_mul<__half, 1>)
                              : (packed ? &launch_silu_mul<__nv_bfloat16, kWide> : &launch_silu_mul<__nv_bfloat16, 1>);
    launch(a, b, y, count, stream);
    return cudaGetLastError();
}

}  // namespace saw
