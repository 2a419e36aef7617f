#include "../launch_frame.cuh"

namespace saw {
template cudaError_t launch_frame<128>(RotateQuantizeKvParams const&, cudaStream_t);
}  // namespace saw
