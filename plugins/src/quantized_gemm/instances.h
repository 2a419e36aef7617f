// The launches of each format of weights: instantiations/ has a file of each.
#pragma once

#include "saw/quantized_gemm/params.h"

namespace saw {

template <WeightType W, int Group>
cudaError_t launch_few_rows(QuantizedGemmParams const& p, cudaStream_t stream);
template <WeightType W, int Group>
cudaError_t launch_dequantize(DequantizeParams const& p, cudaStream_t stream);

}  // namespace saw
