// The columns of all ranks side by side, as a host function; common/library.h says what is true of all of them.
#pragma once

#include "saw/common/library.h"

namespace saw {

// parts [num_ranks, num_rows, width], which NCCL gathers, to out [num_rows, out_width]: the parts of a row in the order
// of the ranks. out_width is at most num_ranks · width: what is beyond it was padding.
SAW_API cudaError_t saw_all_gather(float const* parts, float* out, int num_ranks, int num_rows, int width,
                                   int out_width, cudaStream_t stream);

}  // namespace saw
