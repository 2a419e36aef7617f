// The gate of an MLP, as a host function: see ops.h for what all of them keep to.
#pragma once

#include "saw/common/pool.h"

namespace saw {

// y = a · sigmoid(a) · b, in fp32 and rounded once: count numbers each, on multiples of 16 bytes.
cudaError_t silu_mul(void const* a, void const* b, void* y, size_t count, DType dtype, cudaStream_t stream);

}  // namespace saw
