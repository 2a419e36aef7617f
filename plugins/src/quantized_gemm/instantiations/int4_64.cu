#include "../launch.cuh"

namespace saw {
template cudaError_t launch_few_rows<WeightType::kInt4, 64>(QuantizedGemmParams const&, cudaStream_t);
template cudaError_t launch_dequantize<WeightType::kInt4, 64>(DequantizeParams const&, cudaStream_t);
}  // namespace saw
