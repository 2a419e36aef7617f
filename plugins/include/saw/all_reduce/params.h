// A sum over the ranks of an engine, as host functions; common/library.h says what is true of all of them.
#pragma once

#include <cstddef>
#include <cstdint>

#include "saw/common/library.h"
#include "saw/common/pool.h"
#include "saw/rms_norm/params.h"

namespace saw {

constexpr int kMaxRanks = 8;

// The ranks of an engine, as the GPU of one of them sees the others.
struct Ranks {
    int rank;
    int size;
    void* nccl;                 // ncclComm_t
    size_t one_shot_bytes;      // sums of so many bytes or fewer go by the buffers, larger ones by NCCL; 0: no buffers
    uint8_t* peers[kMaxRanks];  // by rank, its saw_all_reduce_buffer_bytes, which were zeroed before the first sum
};

// Bytes of each rank's buffer.
SAW_API size_t saw_all_reduce_buffer_bytes(int size);
// Bytes of the largest sum that may go by the buffers.
SAW_API size_t saw_all_reduce_most_bytes();
// Whether a sum of `count` 16-bit numbers goes by the buffers.
SAW_API bool saw_is_one_shot(Ranks const& ranks, size_t count);

// y = the sum of all ranks' x, in the order of the ranks, in fp32 and rounded once: the same bits on all of them.
// count numbers each, a multiple of 8, on multiples of 16 bytes. Every rank calls it with the same count; kernels of
// two calls run one after the other. It waits for the other ranks' on the GPU.
SAW_API cudaError_t saw_all_reduce(Ranks const& ranks, void const* x, void* y, size_t count, DType dtype,
                                   cudaStream_t stream);

// Whether such a sum of rows of `width` numbers goes by the buffers with the norm after it.
SAW_API bool saw_is_one_shot_norm(Ranks const& ranks, int num_rows, int width);

// saw_rms_norm() of the sum of all ranks' norm.x, which lies nowhere: one head, with a residual. Otherwise as
// saw_all_reduce(), for rows that saw_is_one_shot_norm() takes.
SAW_API cudaError_t saw_all_reduce_norm(Ranks const& ranks, RmsNormParams const& norm, cudaStream_t stream);

// Tells the plugins of a device the ranks of its engine, before the first step; null takes them away.
SAW_API cudaError_t saw_set_ranks(int device, Ranks const* ranks);
// Null where there are none.
SAW_API Ranks const* saw_get_ranks(int device);

}  // namespace saw
