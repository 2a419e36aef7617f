#include "kv_write_launch.cuh"

namespace saw {
template cudaError_t launch_kv_write<64>(KvWriteParams const&, cudaStream_t);
}  // namespace saw
