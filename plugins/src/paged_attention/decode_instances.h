// How decode.cu finds the instances, one head_dim a file.
#pragma once

#include "saw/paged_attention/params.h"

namespace saw {

// CTAs that the GPU at hand holds, of the instance that needs the most workspace for these parameters.
template <int HeadDim>
int decode_max_ctas(int group);

template <int HeadDim>
cudaError_t launch_decode(DecodeParams const& params, cudaStream_t stream);

}  // namespace saw
