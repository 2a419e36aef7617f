// Launches of kernels for Hopper whose CTAs share a sum as a cluster.
#pragma once

#include <algorithm>
#include <mutex>

#include <cuda_runtime.h>

namespace saw {

constexpr int kMostSplits = 8;  // CTAs of a cluster

// A launch whose CTAs form clusters, and begins before the last one has ended. The attributes are config's.
inline cudaLaunchConfig_t describe_launch(dim3 grid, int threads, int shared, int splits, cudaStream_t stream,
                                          cudaLaunchAttribute (&attributes)[2]) {
    attributes[0].id = cudaLaunchAttributeClusterDimension;
    attributes[0].val.clusterDim.x = splits;
    attributes[0].val.clusterDim.y = attributes[0].val.clusterDim.z = 1;
    attributes[1].id = cudaLaunchAttributeProgrammaticStreamSerialization;
    attributes[1].val.programmaticStreamSerializationAllowed = 1;
    cudaLaunchConfig_t config = {};
    config.gridDim = grid;
    config.blockDim = dim3(threads);
    config.dynamicSmemBytes = shared;
    config.stream = stream;
    config.attrs = attributes;
    config.numAttrs = 2;
    return config;
}

inline cudaError_t count_multiprocessors(int& count) {
    int device = 0;
    if (auto e = cudaGetDevice(&device)) return e;
    return cudaDeviceGetAttribute(&count, cudaDevAttrMultiProcessorCount, device);
}

// What the current device runs of a kernel, found once; GPUs are alike in any machine that serves one engine.
class SplitLaunch {
  public:
    // Safe for threads.
    template <typename Kernel>
    cudaError_t prepare(Kernel* kernel, int threads, int shared) {
        std::lock_guard<std::mutex> const lock(mutex_);
        if (done_) return cudaSuccess;
        cudaFuncAttributes attributes;
        if (auto e = cudaFuncGetAttributes(&attributes, kernel)) return e;
        hopper_ = attributes.maxThreadsPerBlock >= threads;
        if (hopper_)
            if (auto e = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, shared)) return e;
        for (int splits = 1; hopper_ && splits <= kMostSplits; ++splits) {
            cudaLaunchAttribute of_launch[2] = {};
            auto const config = describe_launch(dim3(splits), threads, shared, splits, nullptr, of_launch);
            if (auto e = cudaOccupancyMaxActiveClusters(&clusters_[splits], kernel, &config)) return e;
        }
        done_ = true;
        return cudaSuccess;
    }

    // Whether its code was compiled for sm_90a.
    bool hopper() const { return hopper_; }

    // CTAs that share a sum, of so many parts at most: as many as run at once.
    int splits(int tiles, int parts) const {
        int splits = std::min(kMostSplits, parts);
        while (splits > 1 && clusters_[splits] < tiles) --splits;
        return std::max(splits, 1);
    }

  private:
    std::mutex mutex_;
    bool done_ = false;
    bool hopper_ = false;
    int clusters_[kMostSplits + 1] = {};  // that run at once, by their CTAs
};

}  // namespace saw
