#include "../prefill_launch.cuh"

namespace saw {
template cudaError_t launch_prefill<64>(PrefillParams const&, cudaStream_t);
}  // namespace saw
