#include "../decode_launch.cuh"

namespace saw {
template int decode_max_ctas<64>(int);
template cudaError_t launch_decode<64>(DecodeParams const&, cudaStream_t);
}  // namespace saw
