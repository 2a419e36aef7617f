#include "saw/common/library.h"

namespace saw {

int saw_kernels_version() { return kKernelsVersion; }

char const* saw_kernels_architectures() { return SAW_ARCHITECTURES; }

int saw_cuda_version() { return CUDART_VERSION; }

cudaError_t saw_get_device(int* device) {
    auto const error = cudaGetDevice(device);
    if (error != cudaSuccess) cudaGetLastError();
    return error;
}

cudaError_t saw_set_device(int device) { return cudaSetDevice(device); }

char const* saw_error_name(cudaError_t error) { return cudaGetErrorName(error); }

char const* saw_error_string(cudaError_t error) { return cudaGetErrorString(error); }

bool saw_is_host_address(void const* address) {
    cudaPointerAttributes attributes{};
    if (cudaPointerGetAttributes(&attributes, address) != cudaSuccess) {
        cudaGetLastError();
        return true;
    }
    return attributes.type != cudaMemoryTypeDevice;
}

}  // namespace saw
