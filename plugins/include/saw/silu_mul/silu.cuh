// SiLU, for silu_mul() and for what has it in its own kernel.
#pragma once

namespace saw {

__device__ inline float silu(float x) { return x / (1.0f + __expf(-x)); }

}  // namespace saw
