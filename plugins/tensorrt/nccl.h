// The few entry points of NCCL that SawAllReduce and SawAllGather call, on the communicator that the runtime gave.
// Found at the first call: neither a build of this library, nor that of an engine, nor an engine of one rank needs
// NCCL.
#pragma once

#include <cstddef>

#include <cuda_runtime.h>

namespace saw::trt::nccl {

using Status = int;
using Communicator = void*;

// Numbers of ncclDataType_t and ncclRedOp_t, the same in all of NCCL 2.
enum Type : int { kInt8 = 0, kFloat16 = 6, kBFloat16 = 9 };
constexpr int kSum = 0;

struct Library {
    char const* (*error_string)(Status);
    Status (*all_reduce)(void const* x, void* y, size_t count, Type, int operation, Communicator, cudaStream_t);
    Status (*all_gather)(void const* x, void* y, size_t count, Type, Communicator, cudaStream_t);
};

// The process's. A PluginError if there is none.
Library const& library();
// A PluginError if a call was not successful.
void check(Status status, char const* what);

}  // namespace saw::trt::nccl
