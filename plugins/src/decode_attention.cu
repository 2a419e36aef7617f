#include "decode_attention.h"

namespace saw {

size_t decode_workspace_bytes(int max_sequences, int num_heads, int num_kv_heads, int head_dim) {
    int const group = num_heads / num_kv_heads;
    int ctas = 0;
    switch (head_dim) {
        case 64:
            ctas = decode_max_ctas<64>(group);
            break;
        case 96:
            ctas = decode_max_ctas<96>(group);
            break;
        case 128:
            ctas = decode_max_ctas<128>(group);
            break;
        case 256:
            ctas = decode_max_ctas<256>(group);
            break;
        default:
            break;
    }
    if (ctas == 0) return 0;
    // Two partial sums for each CTA, and a counter for each sequence and KV head.
    size_t const partial = ((size_t(group) * (head_dim + 2) + 3) & ~size_t(3)) * sizeof(float);
    return 2 * ctas * partial + size_t(max_sequences) * num_kv_heads * sizeof(int);
}

cudaError_t decode_attention(DecodeParams const& params, cudaStream_t stream) {
    if (params.num_sequences == 0) return cudaSuccess;
    if (params.cache != CacheType::kInt4) return cudaErrorNotSupported;
    switch (params.head_dim) {
        case 64:
            return launch_decode<64>(params, stream);
        case 96:
            return launch_decode<96>(params, stream);
        case 128:
            return launch_decode<128>(params, stream);
        case 256:
            return launch_decode<256>(params, stream);
        default:
            return cudaErrorInvalidValue;
    }
}

}  // namespace saw
