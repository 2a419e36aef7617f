#include "paged_attention.h"

#include <algorithm>
#include <cmath>

#include "adapter/names.h"

namespace saw::trt {

namespace {

enum RequestType : int32_t { kPrefill = 0, kDecode = 1 };

constexpr size_t kActivationBytes = 2;

}  // namespace

char const* Int4PagedAttention::name() const { return names::kInt4PagedAttention; }

std::vector<Field> Int4PagedAttention::fields() {
    auto fields = PagedOp::fields();
    fields.push_back({names::kSoftmaxScale, &softmax_scale_, false});
    fields.push_back({names::kSoftcap, &softcap_, false});
    fields.push_back({names::kWindow, &window_, false});
    fields.push_back({names::kUseSinks, &use_sinks_, false});
    return fields;
}

void Int4PagedAttention::validate() const {
    PagedOp::validate();
    if (!(std::isfinite(softmax_scale_) && softmax_scale_ >= 0.0f))
        reject("softmax_scale is " + std::to_string(softmax_scale_) +
               ": it must be finite and above 0, or 0 for 1/sqrt(head_dim)");
    if (!(std::isfinite(softcap_) && softcap_ >= 0.0f))
        reject("softcap is " + std::to_string(softcap_) + ": it must be finite and above 0, or 0 for none");
    if (window_ < 0) reject("window is " + std::to_string(window_) + ": it must be at least 1, or 0 for all keys");
    check_flag(names::kUseSinks, use_sinks_);
}

std::vector<Tensor> Int4PagedAttention::inputs() const {
    using nvinfer1::DataType;
    auto const type = activation_type();
    std::vector<Tensor> tensors{
        {names::kQ, type, {kTokens, int64_t(num_heads_) * head_dim_}},
        {names::kK, type, {kTokens, int64_t(num_kv_heads_) * head_dim_}},
        {names::kV, type, {kTokens, int64_t(num_kv_heads_) * head_dim_}},
        {names::kDecodeCounters, DataType::kINT32, {kSequences, num_kv_heads_}},
        {names::kRequestTypes, DataType::kINT32, {kSequences}, true},
        {names::kLastTokenIds, DataType::kINT32, {kSequences}},
        {names::kSequenceLength, DataType::kINT32, {kSequences}},
    };
    for (Tensor& t : pool_inputs()) tensors.push_back(std::move(t));
    tensors.push_back({names::kWindowSizes, DataType::kINT32, {kLayers}, true});
    if (use_sinks_) tensors.push_back({names::kSinks, DataType::kFLOAT, {num_heads_}});
    return tensors;
}

std::vector<Tensor> Int4PagedAttention::outputs() const {
    return {{names::kContext, activation_type(), {kTokens, int64_t(num_heads_) * head_dim_}}};
}

// Of the partial sums. The counters come from SawRotateQuantizeKV, for TensorRT's workspace is not zeroed.
size_t Int4PagedAttention::workspace_bytes() const {
    return saw_decode_workspace_bytes(0, num_heads_, num_kv_heads_, head_dim_);
}

Int4PagedAttention::Step Int4PagedAttention::step(Launch const& launch) const {
    Step s{};
    s.num_tokens = int(launch.input_desc[kQ].dims.d[0]);
    s.num_sequences = int(launch.input_desc[kSequenceLength].dims.d[0]);
    auto const* const begin = static_cast<int32_t const*>(launch.inputs[kRequestTypes]);
    auto const* const end = begin + s.num_sequences;
    auto const* const decodes = std::find_if(begin, end, [](int32_t type) { return type != kPrefill; });
    auto const* const other = std::find_if(decodes, end, [](int32_t type) { return type != kDecode; });
    if (other != end)
        reject("host_request_types is " + std::to_string(*other) + " for sequence " + std::to_string(other - begin) +
               ": a step has prefills (0) first, then decodes (1)");
    s.prefills = int(decodes - begin);
    // No host length is needed for it, which TensorRT-LLM rounds up for its CUDA graphs.
    s.prefill_tokens = s.num_tokens - int(end - decodes);
    if (s.prefill_tokens < 0 || (s.prefills == 0 && s.prefill_tokens != 0))
        reject("the step has " + std::to_string(s.num_tokens) + " tokens, " + std::to_string(s.prefills) +
               " prefills and " + std::to_string(end - decodes) + " decodes: a decode has one token");
    return s;
}

int Int4PagedAttention::window(Launch const& launch) const {
    int64_t const num_layers = launch.input_desc[kWindowSizes].dims.d[0];
    if (layer_idx_ >= num_layers)
        reject("layer_idx is " + std::to_string(layer_idx_) + ": host_max_attention_window_sizes has " +
               std::to_string(num_layers) + " layers");
    int const of_step = static_cast<int32_t const*>(launch.inputs[kWindowSizes])[layer_idx_];
    if (of_step < 0)
        reject("host_max_attention_window_sizes is " + std::to_string(of_step) + " for layer " +
               std::to_string(layer_idx_) + ": it must be at least 1, or 0 for all keys");
    return window_ == 0 || of_step == 0 ? std::max(window_, of_step) : std::min(window_, of_step);
}

void Int4PagedAttention::enqueue(Launch const& launch) const {
    Step const s = step(launch);
    if (s.prefill_tokens > 0) enqueue_prefills(launch, s);
    if (s.num_sequences > s.prefills) enqueue_decodes(launch, s);
}

void Int4PagedAttention::set_shared(AttentionParams& p, Launch const& launch) const {
    p.sinks = use_sinks_ ? static_cast<float const*>(launch.inputs[kSinks]) : nullptr;
    p.pool = pool(launch, kPool);
    p.num_heads = num_heads_;
    p.head_dim = head_dim_;
    p.window = window(launch);
    p.softmax_scale = softmax_scale_ > 0.0f ? softmax_scale_ : 1.0f / std::sqrt(float(head_dim_));
    p.softcap = softcap_;
    p.dtype = dtype();
    p.cache = cache();
}

void Int4PagedAttention::enqueue_prefills(Launch const& launch, Step const& s) const {
    PrefillParams p{};
    set_shared(p, launch);
    p.q = launch.inputs[kQ];
    p.k = launch.inputs[kK];
    p.v = launch.inputs[kV];
    p.out = launch.outputs[0];
    p.last_token_ids = static_cast<int32_t const*>(launch.inputs[kLastTokenIds]);
    p.sequence_length = static_cast<int32_t const*>(launch.inputs[kSequenceLength]);
    p.num_tokens = s.prefill_tokens;
    p.num_sequences = s.prefills;
    check_cuda(saw_prefill_attention(p, launch.stream), "prefill_attention");
}

void Int4PagedAttention::enqueue_decodes(Launch const& launch, Step const& s) const {
    if (launch.workspace == nullptr) reject("no workspace was asked for: build the engine on a GPU that decodes");
    size_t const first = size_t(s.prefill_tokens) * num_heads_ * head_dim_ * kActivationBytes;
    DecodeParams p{};
    set_shared(p, launch);
    p.q = static_cast<uint8_t const*>(launch.inputs[kQ]) + first;
    p.out = static_cast<uint8_t*>(launch.outputs[0]) + first;
    p.sequence_length = static_cast<int32_t const*>(launch.inputs[kSequenceLength]) + s.prefills;
    p.pool.block_offsets = p.pool.table(s.prefills, saw::kKey);
    p.workspace = launch.workspace;
    // Nothing else reads this tensor, and the kernel leaves it as it found it.
    auto const* const counters = static_cast<int32_t const*>(launch.inputs[kDecodeCounters]);
    p.counters = const_cast<int32_t*>(counters) + size_t(s.prefills) * num_kv_heads_;
    p.num_sequences = s.num_sequences - s.prefills;
    check_cuda(saw_decode_attention(p, launch.stream), "decode_attention");
}

}  // namespace saw::trt
