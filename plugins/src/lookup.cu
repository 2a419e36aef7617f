// Rows of a table.
#include <algorithm>

#include "saw/ops.h"

namespace saw {

namespace {

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
void launch(void const* table, int32_t const* rows, void* out, int num_tokens, int num_rows, size_t row_bytes,
            cudaStream_t stream) {
    int const width = int(row_bytes / sizeof(T)), threads = std::min((width + 31) / 32 * 32, 512);
    lookup_kernel<<<num_tokens, threads, 0, stream>>>(static_cast<T const*>(table), rows, static_cast<T*>(out),
                                                      num_rows, width);
}

}  // namespace

cudaError_t lookup(void const* table, int32_t const* rows, void* out, int num_tokens, int num_rows, int width,
                   cudaStream_t stream) {
    if (num_tokens == 0) return cudaSuccess;
    size_t const row_bytes = size_t(width) * 2;
    auto* const of_width = row_bytes % 16 == 0 ? &launch<uint4> : &launch<uint16_t>;
    of_width(table, rows, out, num_tokens, num_rows, row_bytes, stream);
    return cudaGetLastError();
}

}  // namespace saw
