#include "prefill_attention_launch.cuh"

namespace saw {
template cudaError_t launch_prefill<96>(PrefillParams const&, cudaStream_t);
}  // namespace saw
