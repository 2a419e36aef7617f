#include "../decode_launch.cuh"

namespace saw {
template int decode_max_ctas<96>(int);
template cudaError_t launch_decode<96>(DecodeParams const&, cudaStream_t);
}  // namespace saw
