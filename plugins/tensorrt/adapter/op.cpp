#include "op.h"

namespace saw::trt {

void check_cuda(cudaError_t error, char const* what) {
    if (error != cudaSuccess) throw PluginError(std::string(what) + " was not launched: " + saw_error_string(error));
}

void Op::reject(std::string const& message) const { throw PluginError(std::string(name()) + ": " + message); }

void Op::check_flag(char const* field, int32_t value) const {
    if (value != 0 && value != 1) reject(std::string(field) + " is " + std::to_string(value) + ": it must be 0 or 1");
}

void Op::check_count(char const* what, int64_t count, char const* fields) const {
    constexpr int64_t kMost = int64_t(1) << 30;
    if (count > kMost)
        reject(std::string(what) + " are " + std::to_string(count) + ", and must be at most " + std::to_string(kMost) +
               ": give smaller " + fields);
}

void Op::check_dtype() const {
    if (dtype_ != "float16" && dtype_ != "bfloat16") reject("dtype is " + dtype_ + ": it must be float16 or bfloat16");
#if NV_TENSORRT_MAJOR < 10
    if (dtype_ == "bfloat16") reject("dtype is bfloat16, which this TensorRT does not have: give float16");
#endif
}

nvinfer1::DataType Op::activation_type() const {
#if NV_TENSORRT_MAJOR >= 10
    if (dtype_ == "bfloat16") return nvinfer1::DataType::kBF16;
#endif
    return nvinfer1::DataType::kHALF;
}

}  // namespace saw::trt
