#include "../launch.cuh"

namespace saw {
template cudaError_t launch_few_rows<WeightType::kFloat8, 128>(QuantizedGemmParams const&, cudaStream_t);
template cudaError_t launch_dequantize<WeightType::kFloat8, 128>(DequantizeParams const&, cudaStream_t);
}  // namespace saw
