#include "../launch.cuh"

namespace saw {
template cudaError_t launch_rotate_quantize_kv<64>(RotateQuantizeKvParams const&, cudaStream_t);
}  // namespace saw
