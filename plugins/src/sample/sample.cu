#include "saw/sample/kernel.cuh"

namespace saw {
namespace {

// CTAs for a row: as many as the GPU has SMs for, but one where what runs was compiled for GPUs without clusters. What
// they choose does not depend on it.
cudaError_t choose_cluster(int num_rows, int& cluster) {
    static int sms = 0, most = 1;  // of the current device; they are alike in any machine that serves one engine
    if (sms == 0) {
        int device = 0;
        cudaFuncAttributes attributes;
        if (auto e = cudaGetDevice(&device)) return e;
        if (auto e = cudaFuncGetAttributes(&attributes, sample_kernel<true>)) return e;
        most = attributes.ptxVersion >= 90 ? SampleConfig::kMaxCluster : 1;
        if (auto e = cudaDeviceGetAttribute(&sms, cudaDevAttrMultiProcessorCount, device)) return e;
    }
    cluster = most;
    while (cluster > 1 && cluster * num_rows > sms) cluster /= 2;
    return cudaSuccess;
}

}  // namespace

cudaError_t saw_sample(SampleParams const& params, cudaStream_t stream) {
    if (params.num_rows == 0) return cudaSuccess;
    if (params.vocab_size < 1 || params.vocab_size > kMaxVocab) return cudaErrorInvalidValue;
    int cluster = 1;
    if (auto e = choose_cluster(params.num_rows, cluster)) return e;
    cudaLaunchAttribute attribute{};
    attribute.id = cudaLaunchAttributeClusterDimension;
    attribute.val.clusterDim = {unsigned(cluster), 1, 1};
    cudaLaunchConfig_t config{};
    config.gridDim = dim3(unsigned(params.num_rows * cluster));
    config.blockDim = dim3(SampleConfig::kThreads);
    config.stream = stream;
    config.attrs = &attribute;
    config.numAttrs = cluster > 1 ? 1 : 0;
    bool const vector = params.vocab_size % 4 == 0 && reinterpret_cast<uintptr_t>(params.logits) % 16 == 0;
    return vector ? cudaLaunchKernelEx(&config, sample_kernel<true>, params)
                  : cudaLaunchKernelEx(&config, sample_kernel<false>, params);
}

cudaError_t saw_resolve_tokens(int32_t* input_ids, int num_tokens, int32_t const* tokens, cudaStream_t stream) {
    if (num_tokens == 0) return cudaSuccess;
    constexpr int kThreads = 256;
    resolve_tokens_kernel<<<(num_tokens + kThreads - 1) / kThreads, kThreads, 0, stream>>>(input_ids, num_tokens,
                                                                                           tokens);
    return cudaGetLastError();
}

}  // namespace saw
