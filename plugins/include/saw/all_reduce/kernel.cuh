// The kernels of all_reduce(), with a norm and without: one-shot, every rank sends its numbers to all others and adds
// what it gets.
//
// A buffer is   flags    uint32 [kBlocks][kMaxRanks]      by block and sender: the number of the sum that has arrived
//               numbers  uint32 [kBlocks]                 by block: that of this rank's last sum
//               slots    [2][kBlocks][size][kSlotBytes]   by parity of the number, block and sender
//
// A block knows nothing of the others: it has its own number, flags and slots, whatever the extent of a sum. Two slots
// are enough: before a block sends its sum n + 2 it has had the flag n + 1 of every rank, whose kernel of sum n, which
// read the slot, had ended by then.
#pragma once

#include "saw/all_reduce/params.h"
#include "saw/common/ptx.cuh"
#include "saw/common/vec.cuh"
#include "saw/rms_norm/kernel.cuh"

namespace saw {

constexpr int kReduceBlocks = 64;
constexpr int kReduceThreads = 512;
constexpr int kSlotVectors = 2 * kReduceThreads;  // of 16 bytes
constexpr size_t kSlotBytes = size_t(kSlotVectors) * sizeof(uint4);
constexpr size_t kReduceHeadBytes = kReduceBlocks * (kMaxRanks + 1) * sizeof(uint32_t);
static_assert(kReduceHeadBytes % sizeof(uint4) == 0, "slots lie on multiples of 16 bytes");

__device__ inline void store_release(uint32_t* flag, uint32_t value) {
    asm volatile("st.release.sys.global.u32 [%0], %1;" ::"l"(flag), "r"(value) : "memory");
}

__device__ inline uint32_t load_acquire(uint32_t const* flag) {
    uint32_t value;
    asm volatile("ld.acquire.sys.global.u32 %0, [%1];" : "=r"(value) : "l"(flag) : "memory");
    return value;
}

struct ReduceBuffer {
    uint8_t* base;

    __device__ uint32_t* flag(int block, int sender) const {
        return reinterpret_cast<uint32_t*>(base) + block * kMaxRanks + sender;
    }

    __device__ uint32_t* number(int block) const {
        return reinterpret_cast<uint32_t*>(base) + kReduceBlocks * kMaxRanks + block;
    }

    __device__ uint4* slot(uint32_t number, int block, int sender, int size) const {
        size_t const index = (size_t(number & 1) * kReduceBlocks + block) * size + sender;
        return reinterpret_cast<uint4*>(base + kReduceHeadBytes + index * kSlotBytes);
    }
};

// What a block has of a sum: `count` vectors of x, whose numbers of all ranks are there once it is made.
struct BlockSum {
    Ranks const& ranks;
    uint4 const* x;
    uint32_t const number;

    // Each block of every rank calls it. It sends this rank's vectors, and waits for the others'.
    __device__ BlockSum(Ranks const& ranks, uint4 const* x, int count)
        : ranks(ranks), x(x), number(*ReduceBuffer{ranks.peers[ranks.rank]}.number(blockIdx.x) + 1) {
        int const block = blockIdx.x, thread = threadIdx.x, rank = ranks.rank, size = ranks.size;
        ReduceBuffer const ours{ranks.peers[rank]};
        for (int i = thread; i < count; i += blockDim.x) {
            uint4 const sent = x[i];
            for (int step = 1; step < size; ++step) {
                int const peer = (rank + step) % size;
                ReduceBuffer{ranks.peers[peer]}.slot(number, block, rank, size)[i] = sent;
            }
        }
        __syncthreads();
        if (thread < size && thread != rank) {
            store_release(ReduceBuffer{ranks.peers[thread]}.flag(block, rank), number);
            // Numbers wrap around after 2^32 sums.
            while (int32_t(load_acquire(ours.flag(block, thread)) - number) < 0) {
            }
        }
        if (thread == 0) *ours.number(block) = number;
        __syncthreads();
    }

    // A vector of the sum, added in the order of the ranks and rounded once.
    template <typename T>
    __device__ uint4 at(int i) const {
        ReduceBuffer const ours{ranks.peers[ranks.rank]};
        float sum[kWide] = {}, part[kWide];
        for (int sender = 0; sender < ranks.size; ++sender) {
            uint4 const* const slot = ours.slot(number, blockIdx.x, sender, ranks.size);
            unpack_chunk<T>(sender == ranks.rank ? x[i] : __ldcg(slot + i), part);
            for (int j = 0; j < kWide; ++j) sum[j] += part[j];
        }
        return pack_chunk<T>(sum);
    }
};

// Each block has `share` vectors of x, at most kSlotVectors.
template <typename T>
__global__ void __launch_bounds__(kReduceThreads)
    all_reduce_kernel(__grid_constant__ Ranks const ranks, uint4 const* x, uint4* y, int vectors, int share) {
    wait_for_last_grid();
    allow_next_grid();  // a norm, and with it the product after it, whose weights are copied while this one waits
    int const first = blockIdx.x * share, count = min(share, vectors - first);
    BlockSum const sum(ranks, x + first, count);
    for (int i = threadIdx.x; i < count; i += blockDim.x) y[first + i] = sum.at<T>(i);
}

// Likewise, whole rows of `width` vectors.
template <typename T>
__global__ void __launch_bounds__(kReduceThreads)
    all_reduce_norm_kernel(__grid_constant__ Ranks const ranks, RmsNormParams norm, int width, int share) {
    wait_for_last_grid();
    allow_next_grid();
    int const first = blockIdx.x * share, count = min(share, norm.num_rows * width - first);
    auto const at = [&](void const* tensor) { return static_cast<uint4*>(const_cast<void*>(tensor)) + first; };
    BlockSum const reduced(ranks, at(norm.x), count);
    for (int row = 0; row < count; row += width) {
        float square = 0.0f, x[kWide], other[kWide];
        for (int i = row + threadIdx.x; i < row + width; i += blockDim.x) {
            unpack_chunk<T>(reduced.at<T>(i), x);
            unpack_chunk<T>(at(norm.residual)[i], other);
            for (int j = 0; j < kWide; ++j) x[j] += other[j];
            at(norm.sum)[i] = pack_chunk<T>(x);
            unpack_chunk<T>(at(norm.sum)[i], x);
            for (int j = 0; j < kWide; ++j) square += x[j] * x[j];
        }
        float const scale = rsqrtf(sum_of_block(square) / float(width * kWide) + norm.epsilon);
        for (int i = row + threadIdx.x; i < row + width; i += blockDim.x) {
            unpack_chunk<T>(at(norm.sum)[i], x);
            for (int j = 0; j < kWide; ++j) x[j] = x[j] * scale * norm.weight[(i - row) * kWide + j];
            at(norm.y)[i] = pack_chunk<T>(x);
        }
        __syncthreads();  // sum_of_block's memory is used again
    }
}

}  // namespace saw
