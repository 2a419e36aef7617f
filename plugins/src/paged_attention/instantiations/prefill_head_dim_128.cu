#include "../prefill_launch.cuh"

namespace saw {
template cudaError_t launch_prefill<128>(PrefillParams const&, cudaStream_t);
}  // namespace saw
