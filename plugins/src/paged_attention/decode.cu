#include "decode_instances.h"
#include "saw/common/dispatch.h"
#include "saw/paged_attention/decode/work_list.cuh"

namespace saw {

size_t saw_decode_workspace_bytes(int max_sequences, int num_heads, int num_kv_heads, int head_dim) {
    int const group = num_heads / num_kv_heads;
    int const ctas = dispatch_head_dim(head_dim, 0, [&](auto d) { return decode_max_ctas<d>(group); });
    if (ctas == 0) return 0;
    return decode_partials_bytes(ctas, group, head_dim) + size_t(max_sequences) * num_kv_heads * sizeof(int);
}

cudaError_t saw_decode_attention(DecodeParams const& params, cudaStream_t stream) {
    if (params.num_sequences == 0) return cudaSuccess;
    return dispatch_head_dim(params.head_dim, cudaErrorInvalidValue,
                             [&](auto d) { return launch_decode<d>(params, stream); });
}

}  // namespace saw
