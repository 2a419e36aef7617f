#include "quantized_gemm.h"

#include <algorithm>

#include "adapter/names.h"
#include "cublaslt.h"

namespace saw::trt {

namespace {

// Of the weight in 16 bits, for many rows: so much at a time.
constexpr int64_t kSlabBytes = int64_t(128) << 20;
// Of inputs in 8 bits.
constexpr int64_t kInputBytes = int64_t(64) << 20;

int64_t chunks_of(int64_t inputs) { return (inputs + kChunk - 1) / kChunk; }
int64_t blocks_of(int64_t outputs) { return (outputs + kBlockRows - 1) / kBlockRows; }

}  // namespace

char const* QuantizedGemm::name() const { return names::kQuantizedGemm; }

std::vector<Field> QuantizedGemm::fields() {
    return {{names::kDtype, &dtype_, true},
            {names::kInFeatures, &in_features_, true},
            {names::kOutFeatures, &out_features_, true},
            {names::kWeightType, &weight_type_, true},
            {names::kGroupSize, &group_size_, true},
            {names::kQuantizeInput, &quantize_input_, false, false}};
}

void QuantizedGemm::validate() const {
    check_dtype();
    if (weight_type_ != "int4" && weight_type_ != "fp8")
        reject("weight_type is " + weight_type_ + ": it must be int4 or fp8");
    if (in_features_ < 16 || in_features_ % 16 != 0 || out_features_ < 8 || out_features_ % 8 != 0)
        reject("in_features is " + std::to_string(in_features_) + " and out_features " + std::to_string(out_features_) +
               ": they must be multiples of 16 and of 8");
    check_count("the numbers of a row", in_features_, names::kInFeatures);
    check_count("the numbers of a row", out_features_, names::kOutFeatures);
    bool const small = group_size_ == 32 || group_size_ == 64;
    if (group_size_ != kChunk && !(small && type() == WeightType::kInt4))
        reject("group_size is " + std::to_string(group_size_) + ": it must be 128, or of int4 32 or 64");
    check_flag(names::kQuantizeInput, quantize_input_);
    if (quantize_input_ != 0 && (type() != WeightType::kFloat8 || out_features_ % 16 != 0))
        reject("quantize_input is 1, weight_type " + weight_type_ + " and out_features " +
               std::to_string(out_features_) + ": it must be 0 but of fp8 and a multiple of 16");
}

std::vector<Tensor> QuantizedGemm::inputs() const {
    int64_t const chunks = chunks_of(in_features_), blocks = blocks_of(out_features_);
    int64_t const pieces = type() == WeightType::kInt4 ? 2 : 4;
    return {{names::kX, activation_type(), {kTokens, in_features_}},
            {names::kWeight, nvinfer1::DataType::kINT32, {blocks, chunks, 4, pieces, 32, 4}},
            {names::kScales, nvinfer1::DataType::kFLOAT, {blocks, chunks, kChunk / group_size_, kBlockRows}}};
}

std::vector<Tensor> QuantizedGemm::outputs() const {
    return {{names::kY, activation_type(), {kTokens, out_features_}}};
}

int QuantizedGemm::slab_rows() const {
    int64_t const fit = std::max<int64_t>(kSlabBytes / (int64_t(in_features_) * 2) / 256, 1) * 256;
    return int(std::min<int64_t>(fit, out_features_));
}

int QuantizedGemm::input_rows() const { return int(kInputBytes / in_features_) + 1; }

// The weight's slab is of 16 bits, or of as many rows of 8 bits with their scales, which are less.
size_t QuantizedGemm::workspace_bytes() const {
    size_t const inputs = quantize_input_ != 0 ? size_t(input_rows()) * (in_features_ + sizeof(float)) : 0;
    return cublaslt::kWorkspaceBytes + size_t(slab_rows()) * in_features_ * 2 + inputs;
}

void QuantizedGemm::prepare() const { cublaslt::handle(); }

void QuantizedGemm::multiply_many(Launch const& launch, PackedWeight const& weight) const {
    auto const cuda_type = dtype() == DType::kBFloat16 ? CUDA_R_16BF : CUDA_R_16F;
    auto* const y = static_cast<uint16_t*>(launch.outputs[0]);
    void* const slab = static_cast<uint8_t*>(launch.workspace) + cublaslt::kWorkspaceBytes;
    for (int row = 0; row < out_features_; row += slab_rows()) {
        int const rows = std::min(slab_rows(), out_features_ - row);
        check_cuda(saw_dequantize({weight, row, rows, slab, dtype()}, launch.stream), "dequantize");
        cublaslt::Linear const linear{
            launch.input_desc[kX].dims.d[0], in_features_, rows, out_features_, cuda_type, cuda_type};
        cublaslt::multiply(linear, launch.inputs[kX], slab, y + row, launch.workspace, launch.stream);
    }
}

// Of inputs as of the weight, e4m3 numbers with a scale for each row: false if cuBLASLt has no such product.
bool QuantizedGemm::multiply_float8(Launch const& launch, PackedWeight const& weight) const {
    auto const type = dtype() == DType::kBFloat16 ? CUDA_R_16BF : CUDA_R_16F;
    auto* const slab = static_cast<uint8_t*>(launch.workspace) + cublaslt::kWorkspaceBytes;
    auto* const inputs = slab + size_t(slab_rows()) * in_features_ * 2;
    Float8Rows const of_weight{slab, reinterpret_cast<float*>(slab + size_t(slab_rows()) * in_features_)};
    Float8Rows const of_x{inputs, reinterpret_cast<float*>(inputs + size_t(input_rows()) * in_features_)};
    cublaslt::RowScales const scales{of_x.scales, of_weight.scales};
    auto const product = [&](int count, int rows) {
        return cublaslt::Linear{count, in_features_, rows, out_features_, CUDA_R_8F_E4M3, type};
    };
    int const total = int(launch.input_desc[kX].dims.d[0]);
    if (!cublaslt::has_scaled(product(std::min(input_rows(), total), slab_rows()), scales)) return false;
    for (int row = 0; row < out_features_; row += slab_rows()) {
        int const rows = std::min(slab_rows(), out_features_ - row);
        check_cuda(saw_unpack_rows({weight, row, rows, of_weight}, launch.stream), "unpack_rows");
        for (int first = 0; first < total; first += input_rows()) {
            int const count = std::min(input_rows(), total - first);
            auto const* const x = static_cast<uint16_t const*>(launch.inputs[kX]) + size_t(first) * in_features_;
            auto* const y = static_cast<uint16_t*>(launch.outputs[0]) + size_t(first) * out_features_ + row;
            if (row == 0 || count < total)
                check_cuda(saw_quantize_rows({x, count, in_features_, dtype(), of_x}, launch.stream), "quantize_rows");
            if (!cublaslt::multiply_scaled(product(count, rows), scales, of_x.values, of_weight.values, y,
                                           launch.workspace, launch.stream))
                return false;
        }
    }
    return true;
}

void QuantizedGemm::enqueue(Launch const& launch) const {
    for (void const* address : {launch.inputs[kX], launch.inputs[kWeight], launch.inputs[kScales],
                                static_cast<void const*>(launch.outputs[0])})
        if (reinterpret_cast<uintptr_t>(address) % cublaslt::kAlignment != 0)
            reject("x, weight, scales or y does not lie on a multiple of " + std::to_string(cublaslt::kAlignment) +
                   " bytes");
    PackedWeight const weight{launch.inputs[kWeight],
                              static_cast<uint32_t const*>(launch.inputs[kScales]),
                              type(),
                              in_features_,
                              out_features_,
                              group_size_};
    auto const rows = launch.input_desc[kX].dims.d[0];
    if (rows > kFewRows && quantize_input_ != 0 && multiply_float8(launch, weight)) return;
    if (rows > kFewRows) return multiply_many(launch, weight);
    check_cuda(saw_quantized_gemm({launch.inputs[kX], weight, launch.outputs[0], int(rows), dtype()}, launch.stream),
               "quantized_gemm");
}

}  // namespace saw::trt
