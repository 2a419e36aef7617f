// What libsaw_kernels.so is to those that link to it: C symbols, and what is true of all of them.
//
// The operations check nothing but what the kernels rely on, launch, and return. They allocate nothing, synchronize
// nothing and can be captured in a CUDA graph; lengths are read on the GPU. The CUDA runtime is inside the library: a
// plugin library or a Python module has none of its own, and asks this one for the current device.
#pragma once

#include <cuda_runtime.h>

#define SAW_API extern "C" __attribute__((visibility("default")))

namespace saw {

// Of the parameters' layout and of the symbols. It is part of each symbol's version (src/exports.map), so that the
// loader rejects a library of another one.
constexpr int kKernelsVersion = 3;

SAW_API int saw_kernels_version();
// The architectures that the kernels were compiled for, as CMake names them: 80,90a-real.
SAW_API char const* saw_kernels_architectures();
// Of the CUDA runtime inside, as 1000 major + 10 minor: the driver must be of its major version, or newer.
SAW_API int saw_cuda_version();

SAW_API cudaError_t saw_get_device(int* device);
SAW_API cudaError_t saw_set_device(int device);
SAW_API char const* saw_error_name(cudaError_t error);
SAW_API char const* saw_error_string(cudaError_t error);
// Whether the CPU can read there. Without a GPU it can read everywhere.
SAW_API bool saw_is_host_address(void const* address);

}  // namespace saw
