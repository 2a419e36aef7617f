// How kv_write.cu finds the instances, one head_dim a file.
#pragma once

#include "saw/ops.h"

namespace saw {

template <int HeadDim>
cudaError_t launch_kv_write(KvWriteParams const& params, cudaStream_t stream);

}  // namespace saw
