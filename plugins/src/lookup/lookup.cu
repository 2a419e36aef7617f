#include <algorithm>

#include "saw/lookup/kernel.cuh"
#include "saw/lookup/params.h"

namespace saw {

namespace {

template <typename T>
void launch_lookup(void const* table, int32_t const* rows, void* out, int num_tokens, int num_rows, size_t row_bytes,
                   cudaStream_t stream) {
    int const width = int(row_bytes / sizeof(T)), threads = std::min((width + 31) / 32 * 32, 512);
    lookup_kernel<<<num_tokens, threads, 0, stream>>>(static_cast<T const*>(table), rows, static_cast<T*>(out),
                                                      num_rows, width);
}

}  // namespace

cudaError_t saw_lookup(void const* table, int32_t const* rows, void* out, int num_tokens, int num_rows, int width,
                       cudaStream_t stream) {
    if (num_tokens == 0) return cudaSuccess;
    size_t const row_bytes = size_t(width) * 2;
    auto* const of_width = row_bytes % 16 == 0 ? &launch_lookup<uint4> : &launch_lookup<uint16_t>;
    of_width(table, rows, out, num_tokens, num_rows, row_bytes, stream);
    return cudaGetLastError();
}

}  // namespace saw
