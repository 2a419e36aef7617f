#include "kv_write_launch.cuh"

namespace saw {
template cudaError_t launch_kv_write<128>(KvWriteParams const&, cudaStream_t);
}  // namespace saw
