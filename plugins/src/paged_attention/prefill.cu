#include "prefill_instances.h"

namespace saw {

cudaError_t prefill_attention(PrefillParams const& params, cudaStream_t stream) {
    if (params.num_tokens == 0 || params.num_sequences == 0) return cudaSuccess;
    switch (params.head_dim) {
        case 64:
            return launch_prefill<64>(params, stream);
        case 96:
            return launch_prefill<96>(params, stream);
        case 128:
            return launch_prefill<128>(params, stream);
        case 256:
            return launch_prefill<256>(params, stream);
        default:
            return cudaErrorInvalidValue;
    }
}

}  // namespace saw
