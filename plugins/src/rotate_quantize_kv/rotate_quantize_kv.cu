#include "instances.h"

namespace saw {

cudaError_t rotate_quantize_kv(RotateQuantizeKvParams const& params, cudaStream_t stream) {
    if (params.num_tokens == 0) return cudaSuccess;
    if (params.num_sequences < 1) return cudaErrorInvalidValue;
    switch (params.head_dim) {
        case 64:
            return launch_rotate_quantize_kv<64>(params, stream);
        case 96:
            return launch_rotate_quantize_kv<96>(params, stream);
        case 128:
            return launch_rotate_quantize_kv<128>(params, stream);
        case 256:
            return launch_rotate_quantize_kv<256>(params, stream);
        default:
            return cudaErrorInvalidValue;
    }
}

}  // namespace saw
