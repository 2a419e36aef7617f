// How prefill.cu finds the instances, one head_dim a file.
#pragma once

#include "saw/paged_attention/params.h"

namespace saw {

template <int HeadDim>
cudaError_t launch_prefill(PrefillParams const& params, cudaStream_t stream);

}  // namespace saw
