#include "decode_instances.h"
#include "saw/paged_attention/decode/work_list.cuh"

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
    return decode_partials_bytes(ctas, group, head_dim) + size_t(max_sequences) * num_kv_heads * sizeof(int);
}

cudaError_t decode_attention(DecodeParams const& params, cudaStream_t stream) {
    if (params.num_sequences == 0) return cudaSuccess;
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
