// A matrix as Hopper's copies of boxes want it described.
#pragma once

#include <cstdint>

#include <cudaTypedefs.h>
#include <cuda_runtime.h>

#include "saw/common/pool.h"

namespace saw {

// The driver's function, found through the runtime: nothing is linked against libcuda.
inline PFN_cuTensorMapEncodeTiled_v12000 tensor_map_encoder() {
    static auto const function = [] {
        void* found = nullptr;
        cudaDriverEntryPointQueryResult result;
        auto const e =
            cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", &found, 12000, cudaEnableDefault, &result);
        return e == cudaSuccess && result == cudaDriverEntryPointSuccess
                   ? reinterpret_cast<PFN_cuTensorMapEncodeTiled_v12000>(found)
                   : nullptr;
    }();
    return function;
}

// Rows of 16-bit channels, brought 64 channels and box_rows rows at a time.
inline cudaError_t map_rows(CUtensorMap& map, void const* base, uint64_t rows, uint64_t channels, int box_rows,
                            DType dtype) {
    auto* const encode = tensor_map_encoder();
    if (encode == nullptr) return cudaErrorInsufficientDriver;
    uint64_t const shape[2] = {channels, rows}, stride = channels * 2;
    uint32_t const box[2] = {64, uint32_t(box_rows)}, step[2] = {1, 1};
    auto const type = dtype == DType::kFloat16 ? CU_TENSOR_MAP_DATA_TYPE_FLOAT16 : CU_TENSOR_MAP_DATA_TYPE_BFLOAT16;
    auto const result =
        encode(&map, type, 2, const_cast<void*>(base), shape, &stride, box, step, CU_TENSOR_MAP_INTERLEAVE_NONE,
               CU_TENSOR_MAP_SWIZZLE_128B, CU_TENSOR_MAP_L2_PROMOTION_L2_256B, CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
    return result == CUDA_SUCCESS ? cudaSuccess : cudaErrorInvalidValue;
}

}  // namespace saw
