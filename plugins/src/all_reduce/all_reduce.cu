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
