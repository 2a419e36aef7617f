#include "instances.h"
#include "saw/common/dispatch.h"

namespace saw {

cudaError_t saw_rotate_quantize_kv(RotateQuantizeKvParams const& params, cudaStream_t stream) {
    if (params.num_tokens == 0) return cudaSuccess;
    bool const framed = params.k_frame != nullptr;
    if (params.num_sequences < 1 || framed != (params.q_frame != nullptr)) return cudaErrorInvalidValue;
    if (framed && params.cache == CacheType::kUnquantized) return cudaErrorInvalidValue;
    return dispatch_head_dim(params.head_dim, cudaErrorInvalidValue, [&](auto d) {
        return framed ? launch_frame<d>(params, stream) : launch_rotate_quantize_kv<d>(params, stream);
    });
}

}  // namespace saw
