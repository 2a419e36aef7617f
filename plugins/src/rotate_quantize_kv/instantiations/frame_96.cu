#include "../launch_frame.cuh"

namespace saw {
template cudaError_t launch_frame<96>(RotateQuantizeKvParams const&, cudaStream_t);
}  // namespace saw
