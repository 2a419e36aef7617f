#include "rotate_quantize_kv.h"

#include "adapter/names.h"
#include "saw/rotate_quantize_kv/params.h"

namespace saw::trt {

char const* RotateQuantizeKv::name() const { return names::kRotateQuantizeKv; }

std::vector<Field> RotateQuantizeKv::fields() {
    auto fields = PagedOp::fields();
    fields.push_back({names::kHadamardOrder, &hadamard_order_, true});
    fields.push_back({names::kRotateV, &rotate_v_, false});
    fields.push_back({names::kRangeFactor, &range_factor_, false});
    fields.push_back({names::kUseKCenter, &use_k_center_, false});
    fields.push_back({names::kUseKFrame, &use_k_frame_, false, false});
    fields.push_back({names::kUseQFrame, &use_q_frame_, false, false});
    return fields;
}

void RotateQuantizeKv::validate() const {
    PagedOp::validate();
    std::string const order = "hadamard_order is " + std::to_string(hadamard_order_);
    if (kv_ == "saw_int4") {
        bool const power = hadamard_order_ >= 16 && (hadamard_order_ & (hadamard_order_ - 1)) == 0;
        if (!power || head_dim_ % hadamard_order_ != 0)
            reject(order + ": it must be a power of two from 16 that divides head_dim " + std::to_string(head_dim_));
    } else if (kv_ == "saw_k8v4") {
        int const largest = head_dim_ & -head_dim_;
        if (hadamard_order_ != largest)
            reject(order + ": kv saw_k8v4 has kernels of the largest one alone, so give " + std::to_string(largest));
    } else if (hadamard_order_ != 1 || rotate_v_ != 0) {
        reject(order + " and rotate_v " + std::to_string(rotate_v_) + ": kv " + kv_ +
               " has no rotation, so give 1 and 0");
    }
    check_flag(names::kRotateV, rotate_v_);
    check_flag(names::kUseKCenter, use_k_center_);
    check_flag(names::kUseKFrame, use_k_frame_);
    check_flag(names::kUseQFrame, use_q_frame_);
    std::string const frames =
        "use_k_frame is " + std::to_string(use_k_frame_) + " and use_q_frame " + std::to_string(use_q_frame_);
    if (use_k_frame_ != use_q_frame_)
        reject(frames + ": a frame of keys and one of queries come together, so give both or neither");
    if (use_k_frame_ && kv_ == "fp16") reject(frames + ": kv fp16 has no frames, so give 0 and 0");
    if (!(range_factor_ > 0.0f && range_factor_ <= 1.0f))
        reject("range_factor is " + std::to_string(range_factor_) + ": it must be above 0 and at most 1");
}

std::vector<Tensor> RotateQuantizeKv::inputs() const {
    using nvinfer1::DataType;
    std::vector<Tensor> tensors{
        {names::kQkv, activation_type(), {kTokens, (num_heads_ + 2 * int64_t(num_kv_heads_)) * head_dim_}},
        {names::kPositionIds, DataType::kINT32, {kTokens}},
        {names::kLastTokenIds, DataType::kINT32, {kSequences}},
        {names::kSequenceLength, DataType::kINT32, {kSequences}},
    };
    for (Tensor& t : pool_inputs()) tensors.push_back(std::move(t));
    tensors.push_back({names::kCosSin, DataType::kFLOAT, {}});
    if (use_k_center_) tensors.push_back({names::kKCenter, DataType::kFLOAT, {num_kv_heads_, head_dim_}});
    if (use_k_frame_) {
        std::vector<int64_t> const dims{num_kv_heads_, 2, head_dim_, head_dim_};
        tensors.push_back({names::kKFrame, DataType::kHALF, dims});
        tensors.push_back({names::kQFrame, DataType::kHALF, dims});
    }
    return tensors;
}

std::vector<Tensor> RotateQuantizeKv::outputs() const {
    auto const type = activation_type();
    return {
        {names::kQ, type, {kTokens, int64_t(num_heads_) * head_dim_}},
        {names::kK, type, {kTokens, int64_t(num_kv_heads_) * head_dim_}},
        {names::kV, type, {kTokens, int64_t(num_kv_heads_) * head_dim_}},
        {names::kDecodeCounters, nvinfer1::DataType::kINT32, {kSequences, num_kv_heads_}},
    };
}

void RotateQuantizeKv::enqueue(Launch const& launch) const {
    RotateQuantizeKvParams p{};
    p.qkv = launch.inputs[kQkv];
    p.cos_sin = static_cast<float2 const*>(launch.inputs[kCosSin]);
    p.position_ids = static_cast<int32_t const*>(launch.inputs[kPositionIds]);
    p.last_token_ids = static_cast<int32_t const*>(launch.inputs[kLastTokenIds]);
    p.sequence_length = static_cast<int32_t const*>(launch.inputs[kSequenceLength]);
    void const* const* optional = launch.inputs + kOptional;
    if (use_k_center_) p.k_center = static_cast<float const*>(*optional++);
    if (use_k_frame_) {
        p.k_frame = *optional++;
        p.q_frame = *optional++;
    }
    p.q_out = launch.outputs[kQ];
    p.k_out = launch.outputs[kK];
    p.v_out = launch.outputs[kV];
    p.decode_counters = static_cast<int32_t*>(launch.outputs[kDecodeCounters]);
    p.pool = pool(launch, kPool);
    p.num_tokens = int(launch.input_desc[kQkv].dims.d[0]);
    p.num_sequences = int(launch.input_desc[kSequenceLength].dims.d[0]);
    p.num_heads = num_heads_;
    p.head_dim = head_dim_;
    p.hadamard_order = hadamard_order_;
    p.rotate_v = rotate_v_ != 0;
    p.range_factor = range_factor_;
    p.dtype = dtype();
    p.cache = cache();
    check_cuda(saw_rotate_quantize_kv(p, launch.stream), "rotate_quantize_kv");
}

}  // namespace saw::trt
