// From a parameter's value to a type or a constant, for which there is an instance.
#pragma once

#include <type_traits>

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include "saw/common/pool.h"

namespace saw {

template <int Value>
using Constant = std::integral_constant<int, Value>;

// f(Constant<head_dim>), or `otherwise` of a head_dim that no kernel takes.
template <typename Result, typename F>
Result dispatch_head_dim(int head_dim, Result otherwise, F&& f) {
    switch (head_dim) {
        case 64:
            return f(Constant<64>{});
        case 96:
            return f(Constant<96>{});
        case 128:
            return f(Constant<128>{});
        case 256:
            return f(Constant<256>{});
        default:
            return otherwise;
    }
}

// f(T{}), T being the activations' type.
template <typename F>
cudaError_t dispatch_dtype(DType dtype, F&& f) {
    switch (dtype) {
        case DType::kFloat16:
            return f(__half{});
        case DType::kBFloat16:
            return f(__nv_bfloat16{});
        default:
            return cudaErrorInvalidValue;
    }
}

}  // namespace saw
