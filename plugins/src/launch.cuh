// A launch that does not wait for the end of the one before.
#pragma once

#include <utility>

#include <cuda_runtime.h>

namespace saw {

// Launch a kernel of ours whose CTAs may start while the stream's previous kernel still runs (programmatic dependent
// launch; an edge of the same kind in a captured graph). The kernel must call wait_for_last_grid() before it touches
// memory that another kernel writes or reads; only constants may be read before, and only they and what copies have
// brought by __ldg(). Not for kernels whose CTAs are to fill the GPU evenly, as decode's: they would take what room
// others have left, where it happens to be. Code for GPUs older than Hopper does not know the wait, so it is launched
// as usual.
template <auto* Kernel, typename... Args>
cudaError_t launch_dependent(dim3 grid, dim3 block, size_t shared_bytes, cudaStream_t stream, Args&&... args) {
    // Of the device's code; GPUs are alike in any machine that serves one engine.
    static bool const waits = [] {
        cudaFuncAttributes attributes;
        return cudaFuncGetAttributes(&attributes, Kernel) == cudaSuccess && attributes.ptxVersion >= 90;
    }();
    cudaLaunchAttribute attribute = {};
    attribute.id = cudaLaunchAttributeProgrammaticStreamSerialization;
    attribute.val.programmaticStreamSerializationAllowed = 1;
    cudaLaunchConfig_t config = {};
    config.gridDim = grid;
    config.blockDim = block;
    config.dynamicSmemBytes = shared_bytes;
    config.stream = stream;
    config.attrs = &attribute;
    config.numAttrs = waits ? 1 : 0;
    return cudaLaunchKernelEx(&config, Kernel, std::forward<Args>(args)...);
}

}  // namespace saw
