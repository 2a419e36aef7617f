// RMSNorm, as a host function; common/library.h says what is true of all of them.
#pragma once

#include "saw/common/library.h"
#include "saw/common/pool.h"

namespace saw {

// y = x / rms(x) · weight of each head of each row, in fp32 and rounded once; heads that have no weight stay as they
// are. With a residual the rows are x + residual, rounded. Tensors lie on multiples of 16 bytes.
struct RmsNormParams {
    void const* x;         // [num_rows, num_heads, width] of dtype
    void const* residual;  // the same; or null
    float const* weight;   // [num_normed, width]
    void* y;               // as x
    void* sum;             // as x: x + residual, where there is one
    int num_rows;
    int num_heads;
    int num_normed;
    int width;
    float epsilon;  // added to the mean square
    DType dtype;
};
SAW_API cudaError_t saw_rms_norm(RmsNormParams const& params, cudaStream_t stream);

}  // namespace saw
