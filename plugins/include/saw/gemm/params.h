// Linear layers with 16-bit weights for few rows, as a host function; common/library.h says what is true of all of
// them.
#pragma once

#include "saw/common/library.h"
#include "saw/common/pool.h"

namespace saw {

// y = x · weightᵀ, or with a gate silu(x · weightᵀ) · (x · gateᵀ): sums in fp32, rounded once, and with a gate once
// more, as if two products had been stored for silu_mul(). The same rows in the same number give the same bits. Tensors
// lie on multiples of 16 bytes. Weights must not be written by the kernel that is before this one on the stream: they
// are read before that has ended.
struct GemmParams {
    void const* x;       // [num_rows, in_features] of dtype
    void const* weight;  // [out_features, in_features] of dtype
    void const* gate;    // as weight, or null
    void* y;             // [num_rows, out_features] of dtype, or of float
    int num_rows;
    int in_features;
    int out_features;
    DType dtype;
    bool wide;  // whether y is of float; not with a gate
};

// Rows up to which these kernels are faster than cuBLASLt's.
constexpr int kFewGemmRows = 16;
// Whether the current device has a kernel for it: for few rows, in_features a multiple of 8, out_features one of 4,
// on Hopper.
SAW_API bool saw_has_gemm(GemmParams const& params);
SAW_API cudaError_t saw_gemm(GemmParams const& params, cudaStream_t stream);

}  // namespace saw
