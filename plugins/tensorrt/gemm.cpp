#include "gemm.h"

#include "adapter/names.h"
#include "cublaslt.h"

namespace saw::trt {

namespace {

cudaDataType cuda_type(std::string const& dtype) {
    return dtype == "float32" ? CUDA_R_32F : dtype == "bfloat16" ? CUDA_R_16BF : CUDA_R_16F;
}

}  // namespace

char const* Gemm::name() const { return names::kGemm; }

std::vector<Field> Gemm::fields() {
    return {{names::kDtype, &dtype_, true},
            {names::kInFeatures, &in_features_, true},
            {names::kOutFeatures, &out_features_, true},
            {names::kOutputDtype, &output_dtype_, true}};
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
}

std::vector<Tensor> Gemm::inputs() const {
    auto const type = activation_type();
    return {{names::kX, type, {kTokens, in_features_}}, {names::kWeight, type, {out_features_, in_features_}}};
}

std::vector<Tensor> Gemm::outputs() const {
    auto const type = output_dtype_ == "float32" ? nvinfer1::DataType::kFLOAT : activation_type();
    return {{names::kY, type, {kTokens, out_features_}}};
}

size_t Gemm::workspace_bytes() const { return cublaslt::kWorkspaceBytes; }

void Gemm::prepare() const { cublaslt::handle(); }

void Gemm::enqueue(Launch const& launch) const {
    void const *const x = launch.inputs[kX], *const weight = launch.inputs[kWeight];
    void* const y = launch.outputs[0];
    for (void const* address : {x, weight, static_cast<void const*>(y)})
        if (reinterpret_cast<uintptr_t>(address) % cublaslt::kAlignment != 0)
            reject("x, weight or y does not lie on a multiple of " + std::to_string(cublaslt::kAlignment) + " bytes");
    cublaslt::Linear const linear{
        launch.input_desc[kX].dims.d[0], in_features_, out_features_, out_features_, cuda_type(dtype_),
        cuda_type(output_dtype_)};
    cublaslt::multiply(linear, x, weight, y, launch.workspace, launch.stream);
}

}  // namespace saw::trt
