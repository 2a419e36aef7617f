#include "all_reduce.h"

#include "adapter/names.h"
#include "nccl.h"
#include "ranks.h"

namespace saw::trt {

char const* AllReduce::name() const { return names::kAllReduce; }

std::vector<Field> AllReduce::fields() {
    auto fields = RowOp::fields();
    fields.push_back({names::kNumRanks, &num_ranks_, true});
    fields.push_back({names::kUseNorm, &use_norm_, false});
    fields.push_back({names::kEpsilon, &epsilon_, false});
    return fields;
}

void AllReduce::validate() const {
    RowOp::validate();
    check_num_ranks(*this, num_ranks_);
    check_flag(names::kUseNorm, use_norm_);
    check_epsilon(epsilon_);
}

Tensor AllReduce::rows(char const* name) const { return {name, activation_type(), {kTokens, hidden_size_}}; }

std::vector<Tensor> AllReduce::inputs() const {
    if (!use_norm_) return {rows(names::kX)};
    return {rows(names::kX), {names::kWeight, nvinfer1::DataType::kFLOAT, {1, hidden_size_}}, rows(names::kResidual)};
}

std::vector<Tensor> AllReduce::outputs() const {
    if (!use_norm_) return {rows(names::kY)};
    return {rows(names::kY), rows(names::kSum)};
}

void AllReduce::enqueue(Launch const& launch) const {
    Ranks const& ranks = ranks_of_device(*this, num_ranks_);
    if (!use_norm_) return reduce(ranks, launch, launch.outputs[kY]);
    RmsNormParams p{};
    p.x = launch.inputs[kX];
    p.weight = static_cast<float const*>(launch.inputs[kWeight]);
    p.residual = launch.inputs[kResidual];
    p.y = launch.outputs[kY];
    p.sum = launch.outputs[kSum];
    p.num_rows = int(launch.input_desc[kX].dims.d[0]);
    p.num_heads = p.num_normed = 1;
    p.width = hidden_size_;
    p.epsilon = epsilon_;
    p.dtype = dtype();
    if (saw_is_one_shot_norm(ranks, p.num_rows, p.width)) {
        check_cuda(saw_all_reduce_norm(ranks, p, launch.stream), "all_reduce_norm");
        return;
    }
    reduce(ranks, launch, p.sum);
    p.x = p.sum;  // a thread reads what it writes there
    check_cuda(saw_rms_norm(p, launch.stream), "rms_norm");
}

void AllReduce::reduce(Ranks const& ranks, Launch const& launch, void* y) const {
    size_t const count = size_t(launch.input_desc[kX].dims.d[0]) * hidden_size_;
    void const* const x = launch.inputs[kX];
    if (saw_is_one_shot(ranks, count)) {
        check_cuda(saw_all_reduce(ranks, x, y, count, dtype(), launch.stream), "all_reduce");
        return;
    }
    auto const type = dtype() == DType::kBFloat16 ? nccl::kBFloat16 : nccl::kFloat16;
    nccl::check(nccl::library().all_reduce(x, y, count, type, nccl::kSum, ranks.nccl, launch.stream), "ncclAllReduce");
}

}  // namespace saw::trt
