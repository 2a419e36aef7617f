// The gate of an MLP, as a host function; common/library.h says what is true of all of them.
#pragma once

#include "saw/common/library.h"
#include "saw/common/pool.h"

namespace saw {

// y = a · sigmoid(a) · b, in fp32 and rounded once: count numbers each, on multiples of 16 bytes.
SAW_API cudaError_t saw_silu_mul(void const* a, void const* b, void* y, size_t count, DType dtype, cudaStream_t stream);

}  // namespace saw
