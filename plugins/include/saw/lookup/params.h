// Rows of a table, as a host function; common/library.h says what is true of all of them.
#pragma once

#include <cstdint>

#include "saw/common/library.h"

namespace saw {

// Rows of a table of 16-bit numbers: out[i] is table[rows[i]], or zeros where there is no such row.
// table [num_rows, width], rows [num_tokens], out [num_tokens, width]: table and out on multiples of 16 bytes.
SAW_API cudaError_t saw_lookup(void const* table, int32_t const* rows, void* out, int num_tokens, int num_rows,
                               int width, cudaStream_t stream);

}  // namespace saw
