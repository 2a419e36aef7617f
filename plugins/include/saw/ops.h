// The operations of this library as host functions. They check nothing but what the kernels rely on, launch, and
// return. They allocate nothing, synchronize nothing and can be captured in a CUDA graph; lengths are read on the GPU.
#pragma once

#include "saw/lookup/params.h"
#include "saw/paged_attention/params.h"
#include "saw/rms_norm/params.h"
#include "saw/rotate_quantize_kv/params.h"
#include "saw/sample/params.h"
#include "saw/silu_mul/params.h"
