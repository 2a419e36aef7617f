#include "gemm.h"

#include <algorithm>

#include "adapter/names.h"
#include "cublaslt.h"
#include "saw/gemm/params.h"
#include "saw/silu_mul/params.h"

namespace saw::trt {

namespace {

// Of many rows' products with a gate: so much at a time.
constexpr int64_t kGatedBytes = int64_t(128) << 20;

cudaDataType cuda_type(std::string const& dtype) {
    return dtype == "float32" ? CUDA_R_32F : dtype == "bfloat16" ? CUDA_R_16BF : CUDA_R_16F;
}

}  // namespace

char const* Gemm::name() const { return names::kGemm; }

std::vector<Field> Gemm::fields() {
    return {{names::kDtype, &dtype_, true},
            {names::kInFeatures, &in_features_, true},
            {names::kOutFeatures, &out_features_, true},
            {names::kOutputDtype, &output_dtype_, true},
            {names::kUseGate, &use_gate_, false, false}};
}

void Gemm::validate() const {
    check_dtype();
    if (in_features_ < 1 || out_features_ < 1)
        reject("in_features is " + std::to_string(in_features_) + " and out_features " + std::to_string(out_features_) +
               ": both must be at least 1");
    check_count("the numbers of a row", in_features_, names::kInFeatures);
    check_count("the numbers of a row", out_features_, names::kOutFeatures);
    if (output_dtype_ != dtype_ && output_dtype_ != "float32")
        reject("output_dtype is " + output_dtype_ + ": it must be float32 or dtype, " + dtype_);
    check_flag(names::kUseGate, use_gate_);
    if (use_gate_ && output_dtype_ != dtype_)
        reject("output_dtype is " + output_dtype_ + " and use_gate 1: with a gate it must be dtype, " + dtype_);
}

std::vector<Tensor> Gemm::inputs() const {
    auto const type = activation_type();
    std::vector<Tensor> tensors{{names::kX, type, {kTokens, in_features_}},
                                {names::kWeight, type, {out_features_, in_features_}}};
    if (use_gate_) tensors.push_back({names::kGate, type, {out_features_, in_features_}});
    return tensors;
}

std::vector<Tensor> Gemm::outputs() const {
    auto const type = output_dtype_ == "float32" ? nvinfer1::DataType::kFLOAT : activation_type();
    return {{names::kY, type, {kTokens, out_features_}}};
}

int64_t Gemm::slab_rows() const { return std::max<int64_t>(kGatedBytes / (int64_t(out_features_) * 2) / 256, 1) * 256; }

size_t Gemm::workspace_bytes() const {
    return cublaslt::kWorkspaceBytes + (use_gate_ ? size_t(slab_rows()) * out_features_ * 2 : 0);
}

void Gemm::prepare() const { cublaslt::handle(); }

void Gemm::enqueue(Launch const& launch) const {
    void const *const x = launch.inputs[kX], *const weight = launch.inputs[kWeight];
    void const* const gate = use_gate_ ? launch.inputs[kGate] : nullptr;
    void* const y = launch.outputs[0];
    for (void const* address : {x, weight, gate, static_cast<void const*>(y)})
        if (reinterpret_cast<uintptr_t>(address) % cublaslt::kAlignment != 0)
            reject("x, weight, gate or y does not lie on a multiple of " + std::to_string(cublaslt::kAlignment) +
                   " bytes");
    int const rows = int(launch.input_desc[kX].dims.d[0]);
    bool const wide = output_dtype_ != dtype_;
    GemmParams const few{x, weight, gate, y, rows, in_features_, out_features_, dtype(), wide};
    if (saw_has_gemm(few)) {
        check_cuda(saw_gemm(few, launch.stream), "gemm");
    } else if (use_gate_) {
        multiply_gated(launch);
    } else {
        multiply(launch, 0, rows, weight, y);
    }
}

void Gemm::multiply(Launch const& launch, int64_t first, int64_t rows, void const* weight, void* y) const {
    cublaslt::Linear const linear{rows,          in_features_,      out_features_,
                                  out_features_, cuda_type(dtype_), cuda_type(output_dtype_)};
    auto const* const x = static_cast<uint16_t const*>(launch.inputs[kX]) + first * in_features_;
    cublaslt::multiply(linear, x, weight, y, launch.workspace, launch.stream);
}

void Gemm::multiply_gated(Launch const& launch) const {
    int64_t const all = launch.input_desc[kX].dims.d[0];
    void* const slab = static_cast<uint8_t*>(launch.workspace) + cublaslt::kWorkspaceBytes;
    for (int64_t first = 0; first < all; first += slab_rows()) {
        int64_t const rows = std::min(slab_rows(), all - first);
        auto* const y = static_cast<uint16_t*>(launch.outputs[0]) + first * out_features_;
        multiply(launch, first, rows, launch.inputs[kWeight], y);
        multiply(launch, first, rows, launch.inputs[kGate], slab);
        check_cuda(saw_silu_mul(y, slab, y, size_t(rows) * out_features_, dtype(), launch.stream), "silu_mul");
    }
}

}  // namespace saw::trt
