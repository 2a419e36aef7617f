#include "../decode_launch.cuh"

namespace saw {
template int decode_max_ctas<128>(int);
template cudaError_t launch_decode<128>(DecodeParams const&, cudaStream_t);
}  // namespace saw
