#include "all_gather.h"

#include <algorithm>

#include "adapter/names.h"
#include "nccl.h"
#include "ranks.h"
#include "saw/all_gather/params.h"

namespace saw::trt {

char const* AllGather::name() const { return names::kAllGather; }

std::vector<Field> AllGather::fields() {
    return {{names::kInFeatures, &in_features_, true},
            {names::kOutFeatures, &out_features_, true},
            {names::kNumRanks, &num_ranks_, true}};
}

void AllGather::validate() const {
    check_num_ranks(*this, num_ranks_);
    int64_t const gathered = int64_t(in_features_) * num_ranks_;
    if (in_features_ < 1 || out_features_ < 1 || out_features_ > gathered)
        reject("in_features is " + std::to_string(in_features_) + " and out_features " + std::to_string(out_features_) +
               ": both must be at least 1, and num_ranks times in_features at least out_features");
    check_count("the numbers of a row", gathered, names::kInFeatures);
}

std::vector<Tensor> AllGather::inputs() const {
    return {{names::kX, nvinfer1::DataType::kFLOAT, {kTokens, in_features_}}};
}

std::vector<Tensor> AllGather::outputs() const {
    return {{names::kY, nvinfer1::DataType::kFLOAT, {kTokens, out_features_}}};
}

int AllGather::rows_at_once() const {
    constexpr size_t kWorkspaceBytes = size_t(64) << 20;
    return int(std::max<size_t>(1, kWorkspaceBytes / row_bytes()));
}

size_t AllGather::workspace_bytes() const { return rows_at_once() * row_bytes(); }

void AllGather::enqueue(Launch const& launch) const {
    Ranks const& ranks = ranks_of_device(*this, num_ranks_);
    int const rows = int(launch.input_desc[0].dims.d[0]);
    auto const* const x = static_cast<float const*>(launch.inputs[0]);
    auto* const y = static_cast<float*>(launch.outputs[0]);
    auto* const parts = static_cast<float*>(launch.workspace);
    for (int first = 0; first < rows; first += rows_at_once()) {
        int const count = std::min(rows_at_once(), rows - first);
        size_t const bytes = sizeof(float) * count * in_features_;
        nccl::check(nccl::library().all_gather(x + size_t(first) * in_features_, parts, bytes, nccl::kInt8, ranks.nccl,
                                               launch.stream),
                    "ncclAllGather");
        check_cuda(saw_all_gather(parts, y + size_t(first) * out_features_, num_ranks_, count, in_features_,
                                  out_features_, launch.stream),
                   "all_gather");
    }
}

}  // namespace saw::trt
