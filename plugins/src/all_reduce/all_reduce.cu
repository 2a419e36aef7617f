#include <algorithm>
#include <array>

#include "../launch.cuh"
#include "saw/all_reduce/kernel.cuh"
#include "saw/all_reduce/params.h"
#include "saw/common/dispatch.h"

namespace saw {

namespace {

// Written before the first step and read by all.
std::array<Ranks, 64> ranks_of_devices{};

}  // namespace

size_t saw_all_reduce_buffer_bytes(int size) {
    return kReduceHeadBytes + size_t(2) * kReduceBlocks * size * kSlotBytes;
}

size_t saw_all_reduce_most_bytes() { return kReduceBlocks * kSlotBytes; }

bool saw_is_one_shot(Ranks const& ranks, size_t count) {
    return count % kWide == 0 && count * 2 <= std::min(ranks.one_shot_bytes, saw_all_reduce_most_bytes());
}

cudaError_t saw_all_reduce(Ranks const& ranks, void const* x, void* y, size_t count, DType dtype, cudaStream_t stream) {
    if (count == 0) return cudaSuccess;
    if (count % kWide != 0 || count * 2 > saw_all_reduce_most_bytes()) return cudaErrorInvalidValue;
    int const vectors = int(count / kWide);
    // Few threads a block while there are blocks: each waits for its own flags only.
    int const threads = std::clamp(vectors / kReduceBlocks / 32 * 32, 128, kReduceThreads);
    int const share = std::max(threads, (vectors + kReduceBlocks - 1) / kReduceBlocks);
    int const blocks = (vectors + share - 1) / share;
    return dispatch_dtype(dtype, [&](auto type) {
        return launch_dependent<&all_reduce_kernel<decltype(type)>>(
            blocks, threads, 0, stream, ranks, static_cast<uint4 const*>(x), static_cast<uint4*>(y), vectors, share);
    });
}

bool saw_is_one_shot_norm(Ranks const& ranks, int num_rows, int width) {
    int const a_block = (num_rows + kReduceBlocks - 1) / kReduceBlocks;
    return saw_is_one_shot(ranks, size_t(num_rows) * width) && width % kWide == 0 &&
           int64_t(a_block) * width <= int64_t(kSlotVectors) * kWide;
}

cudaError_t saw_all_reduce_norm(Ranks const& ranks, RmsNormParams const& norm, cudaStream_t stream) {
    if (norm.num_rows == 0) return cudaSuccess;
    bool const is_known = norm.num_heads == 1 && norm.num_normed == 1 && norm.residual != nullptr;
    if (!is_known || !saw_is_one_shot_norm(ranks, norm.num_rows, norm.width)) return cudaErrorInvalidValue;
    int const width = norm.width / kWide;
    int const a_block = (norm.num_rows + kReduceBlocks - 1) / kReduceBlocks;
    int const blocks = (norm.num_rows + a_block - 1) / a_block;
    int const threads = std::min((width + 31) / 32 * 32, kReduceThreads);
    return dispatch_dtype(norm.dtype, [&](auto type) {
        return launch_dependent<&all_reduce_norm_kernel<decltype(type)>>(blocks, threads, 0, stream, ranks, norm, width,
                                                                         a_block * width);
    });
}

cudaError_t saw_set_ranks(int device, Ranks const* ranks) {
    if (device < 0 || device >= int(ranks_of_devices.size())) return cudaErrorInvalidDevice;
    ranks_of_devices[device] = ranks == nullptr ? Ranks{} : *ranks;
    return cudaSuccess;
}

Ranks const* saw_get_ranks(int device) {
    bool const is_known = device >= 0 && device < int(ranks_of_devices.size());
    return is_known && ranks_of_devices[device].size > 0 ? &ranks_of_devices[device] : nullptr;
}

}  // namespace saw
