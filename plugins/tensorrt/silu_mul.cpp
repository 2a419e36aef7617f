#include "silu_mul.h"

#include "adapter/names.h"
#include "saw/silu_mul/params.h"

namespace saw::trt {

char const* SiluMul::name() const { return names::kSiluMul; }

std::vector<Tensor> SiluMul::inputs() const {
    auto const type = activation_type();
    return {{names::kX, type, {kTokens, hidden_size_}}, {names::kGate, type, {kTokens, hidden_size_}}};
}

std::vector<Tensor> SiluMul::outputs() const { return {{names::kY, activation_type(), {kTokens, hidden_size_}}}; }

void SiluMul::enqueue(Launch const& launch) const {
    size_t const count = size_t(launch.input_desc[0].dims.d[0]) * hidden_size_;
    check_cuda(saw_silu_mul(launch.inputs[0], launch.inputs[1], launch.outputs[0], count, dtype(), launch.stream),
               "silu_mul");
}

}  // namespace saw::trt
