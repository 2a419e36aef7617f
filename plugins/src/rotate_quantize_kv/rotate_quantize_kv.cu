#include "instances.h"
#include "saw/common/dispatch.h"

namespace saw {

cudaError_t saw_rotate_quantize_kv(RotateQuantizeKvParams const& params, cudaStream_t stream) {
    if (params.num_tokens == 0) return cudaSuccess;
    if (params.num_sequences < 1) return cudaErrorInvalidValue;
    return dispatch_head_dim(params.head_dim, cudaErrorInvalidValue,
                             [&](auto d) { return launch_rotate_quantize_kv<d>(params, stream); });
}

}  // namespace saw
