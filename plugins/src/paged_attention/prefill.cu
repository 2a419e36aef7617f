#include "prefill_instances.h"
#include "saw/common/dispatch.h"

namespace saw {

cudaError_t saw_prefill_attention(PrefillParams const& params, cudaStream_t stream) {
    if (params.num_tokens == 0 || params.num_sequences == 0) return cudaSuccess;
    return dispatch_head_dim(params.head_dim, cudaErrorInvalidValue,
                             [&](auto d) { return launch_prefill<d>(params, stream); });
}

}  // namespace saw
