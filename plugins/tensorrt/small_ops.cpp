#include "small_ops.h"

#include <cmath>

#include "names.h"

namespace saw::trt {

std::vector<Field> SmallOp::fields() {
    return {{names::kDtype, &dtype_, true}, {names::kHiddenSize, &hidden_size_, true}};
}

void SmallOp::validate() const {
    check_dtype(dtype_);
    if (hidden_size_ < 1) refuse("hidden_size is " + std::to_string(hidden_size_) + ": it must be at least 1");
    check_count("the numbers of a row", hidden_size_, names::kHiddenSize);
}

char const* Lookup::name() const { return names::kLookup; }

std::vector<Field> Lookup::fields() {
    auto fields = SmallOp::fields();
    fields.push_back({names::kVocabSize, &vocab_size_, true});
    return fields;
}

void Lookup::validate() const {
    SmallOp::validate();
    if (vocab_size_ < 1) refuse("vocab_size is " + std::to_string(vocab_size_) + ": it must be at least 1");
}

std::vector<Tensor> Lookup::inputs() const {
    return {{names::kRows, nvinfer1::DataType::kINT32, {kTokens}},
            {names::kWeight, activation_type(), {vocab_size_, hidden_size_}}};
}

std::vector<Tensor> Lookup::outputs() const { return {{names::kY, activation_type(), {kTokens, hidden_size_}}}; }

void Lookup::enqueue(Launch const& launch) const {
    check_cuda(lookup(launch.inputs[kWeight], static_cast<int32_t const*>(launch.inputs[kRows]), launch.outputs[0],
                      int(launch.input_desc[kRows].dims.d[0]), vocab_size_, hidden_size_, launch.stream),
               "lookup");
}

char const* RmsNorm::name() const { return names::kRmsNorm; }

std::vector<Field> RmsNorm::fields() {
    auto fields = SmallOp::fields();
    fields.push_back({names::kEpsilon, &epsilon_, true});
    fields.push_back({names::kUseResidual, &use_residual_, false});
    fields.push_back({names::kNumHeads, &num_heads_, false});
    fields.push_back({names::kNumNormed, &num_normed_, false});
    return fields;
}

void RmsNorm::validate() const {
    SmallOp::validate();
    if (!(std::isfinite(epsilon_) && epsilon_ >= 0.0f))
        refuse("epsilon is " + std::to_string(epsilon_) + ": it must be finite and at least 0");
    check_flag(names::kUseResidual, use_residual_);
    if (num_normed_ < 1 || num_heads_ < num_normed_)
        refuse("num_heads is " + std::to_string(num_heads_) + " and num_normed " + std::to_string(num_normed_) +
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
    check_cuda(rms_norm(p, launch.stream), "rms_norm");
}

char const* SiluMul::name() const { return names::kSiluMul; }

std::vector<Tensor> SiluMul::inputs() const {
    auto const type = activation_type();
    return {{names::kX, type, {kTokens, hidden_size_}}, {names::kGate, type, {kTokens, hidden_size_}}};
}

std::vector<Tensor> SiluMul::outputs() const { return {{names::kY, activation_type(), {kTokens, hidden_size_}}}; }

void SiluMul::enqueue(Launch const& launch) const {
    size_t const count = size_t(launch.input_desc[0].dims.d[0]) * hidden_size_;
    check_cuda(silu_mul(launch.inputs[0], launch.inputs[1], launch.outputs[0], count, dtype(), launch.stream),
               "silu_mul");
}

}  // namespace saw::trt
