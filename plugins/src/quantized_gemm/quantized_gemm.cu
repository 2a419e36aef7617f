#include "saw/quantized_gemm/params.h"

#include "instances.h"

namespace saw {

namespace {

template <WeightType Type, int Group>
struct Format {
    static constexpr WeightType type = Type;
    static constexpr int group = Group;
};

// f(Format{}) of a weight.
template <typename F>
cudaError_t dispatch_format(PackedWeight const& weight, F&& f) {
    if (weight.type == WeightType::kFloat8) return f(Format<WeightType::kFloat8, kChunk>{});
    switch (weight.group) {
        case 32:
            return f(Format<WeightType::kInt4, 32>{});
        case 64:
            return f(Format<WeightType::kInt4, 64>{});
        case kChunk:
            return f(Format<WeightType::kInt4, kChunk>{});
        default:
            return cudaErrorInvalidValue;
    }
}

}  // namespace

cudaError_t saw_quantized_gemm(QuantizedGemmParams const& p, cudaStream_t stream) {
    if (p.num_rows == 0) return cudaSuccess;
    return dispatch_format(p.weight,
                           [&](auto format) { return launch_few_rows<format.type, format.group>(p, stream); });
}

cudaError_t saw_dequantize(DequantizeParams const& p, cudaStream_t stream) {
    if (p.num_rows == 0) return cudaSuccess;
    return dispatch_format(p.weight,
                           [&](auto format) { return launch_dequantize<format.type, format.group>(p, stream); });
}

}  // namespace saw
