// How rotate_quantize_kv.cu finds the instances, one head_dim a file.
#pragma once

#include "saw/rotate_quantize_kv/params.h"

namespace saw {

template <int HeadDim>
cudaError_t launch_rotate_quantize_kv(RotateQuantizeKvParams const& params, cudaStream_t stream);

// With frames.
template <int HeadDim>
cudaError_t launch_frame(RotateQuantizeKvParams const& params, cudaStream_t stream);

}  // namespace saw
