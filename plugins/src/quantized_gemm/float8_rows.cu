#include "saw/quantized_gemm/float8_rows.cuh"

#include "saw/common/dispatch.h"

namespace saw {

cudaError_t saw_quantize_rows(QuantizeRowsParams const& p, cudaStream_t stream) {
    if (p.num_rows == 0) return cudaSuccess;
    return dispatch_dtype(p.dtype, [&](auto type) {
        quantize_rows_kernel<decltype(type)><<<p.num_rows, kQuantizeThreads, 0, stream>>>(p);
        return cudaGetLastError();
    });
}

cudaError_t saw_unpack_rows(UnpackRowsParams const& p, cudaStream_t stream) {
    if (p.num_rows == 0) return cudaSuccess;
    dim3 const grid((p.weight.in_features + kChunk - 1) / kChunk, (p.num_rows + kBlockRows - 1) / kBlockRows);
    unpack_rows_kernel<<<grid, 128, 0, stream>>>(p);
    return cudaGetLastError();
}

}  // namespace saw
