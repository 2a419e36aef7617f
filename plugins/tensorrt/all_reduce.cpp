#include "all_reduce.h"

#include "adapter/names.h"
#include "nccl.h"
#include "ranks.h"
#include "saw/all_reduce/params.h"

namespace saw::trt {

char const* AllReduce::name() const { return names::kAllReduce; }

std::vector<Field> AllReduce::fields() {
    auto fields = RowOp::fields();
    fields.push_back({names::kNumRanks, &num_ranks_, true});
    return fields;
}

void AllReduce::validate() const {
    RowOp::validate();
    check_num_ranks(*this, num_ranks_);
}

std::vector<Tensor> AllReduce::inputs() const { return {{names::kX, activation_type(), {kTokens, hidden_size_}}}; }

std::vector<Tensor> AllReduce::outputs() const { return {{names::kY, activation_type(), {kTokens, hidden_size_}}}; }

void AllReduce::enqueue(Launch const& launch) const {
    Ranks const& ranks = ranks_of_device(*this, num_ranks_);
    size_t const count = size_t(launch.input_desc[0].dims.d[0]) * hidden_size_;
    void const* const x = launch.inputs[0];
    void* const y = launch.outputs[0];
    if (saw_is_one_shot(ranks, count)) {
        check_cuda(saw_all_reduce(ranks, x, y, count, dtype(), launch.stream), "all_reduce");
        return;
    }
    auto const type = dtype() == DType::kBFloat16 ? nccl::kBFloat16 : nccl::kFloat16;
    nccl::check(nccl::library().all_reduce(x, y, count, type, nccl::kSum, ranks.nccl, launch.stream), "ncclAllReduce");
}

}  // namespace saw::trt
