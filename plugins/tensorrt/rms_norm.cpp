#include "rms_norm.h"

#include "adapter/names.h"
#include "saw/rms_norm/params.h"

namespace saw::trt {

char const* RmsNorm::name() const { return names::kRmsNorm; }

std::vector<Field> RmsNorm::fields() {
    auto fields = RowOp::fields();
    fields.push_back({names::kEpsilon, &epsilon_, true});
    fields.push_back({names::kUseResidual, &use_residual_, false});
    fields.push_back({names::kNumHeads, &num_heads_, false});
    fields.push_back({names::kNumNormed, &num_normed_, false});
    return fields;
}

void RmsNorm::validate() const {
    RowOp::validate();
    check_epsilon(epsilon_);
    check_flag(names::kUseResidual, use_residual_);
    if (num_normed_ < 1 || num_heads_ < num_normed_)
        reject("num_heads is " + std::to_string(num_heads_) + " and num_normed " + std::to_string(num_normed_) +
               ": num_normed must be from 1 to num_heads");
    check_count("the numbers of a row", int64_t(num_heads_) * hidden_size_, "num_heads or hidden_size");
}

Tensor RmsNorm::rows(char const* name) const {
    return {name, activation_type(), {kTokens, int64_t(num_heads_) * hidden_size_}};
}

std::vector<Tensor> RmsNorm::inputs() const {
    std::vector<Tensor> tensors{rows(names::kX),
                                {names::kWeight, nvinfer1::DataType::kFLOAT, {num_normed_, hidden_size_}}};
    if (use_residual_) tensors.push_back(rows(names::kResidual));
    return tensors;
}

std::vector<Tensor> RmsNorm::outputs() const {
    std::vector<Tensor> tensors{rows(names::kY)};
    if (use_residual_) tensors.push_back(rows(names::kSum));
    return tensors;
}

void RmsNorm::enqueue(Launch const& launch) const {
    RmsNormParams p{};
    p.x = launch.inputs[kX];
    p.weight = static_cast<float const*>(launch.inputs[kWeight]);
    p.y = launch.outputs[0];
    if (use_residual_) {
        p.residual = launch.inputs[kResidual];
        p.sum = launch.outputs[1];
    }
    p.num_rows = int(launch.input_desc[kX].dims.d[0]);
    p.num_heads = num_heads_;
    p.num_normed = num_normed_;
    p.width = hidden_size_;
    p.epsilon = epsilon_;
    p.dtype = dtype();
    check_cuda(saw_rms_norm(p, launch.stream), "rms_norm");
}

}  // namespace saw::trt
