// What an operation is to the adapters: fields, tensors and a launch, each said once. The adapters (plugin_v2.h,
// plugin_v3.h) translate it to TensorRT's two plugin interfaces and catch what it throws.
#pragma once

#include <cstdint>
#include <memory>
#include <stdexcept>
#include <string>
#include <variant>
#include <vector>

#include <NvInferRuntime.h>
#include <cuda_runtime.h>

#include "saw/common/library.h"
#include "saw/common/pool.h"

namespace saw::trt {

// One sentence: what was given, what is needed, what to do.
class PluginError : public std::runtime_error {
  public:
    using std::runtime_error::runtime_error;
};

// TensorRT has INT64 tensors from 10 on; before, an address travels as two INT32s.
#if NV_TENSORRT_MAJOR >= 10
constexpr nvinfer1::DataType kAddressType = nvinfer1::DataType::kINT64;
#else
constexpr nvinfer1::DataType kAddressType = nvinfer1::DataType::kINT32;
#endif

// A parameter by its name, and where the op keeps it.
struct Field {
    char const* name;
    std::variant<int32_t*, float*, std::string*> value;
    bool required;
    bool in_every_engine = true;  // else engines from before the field was there have its default
};

// Extents of a tensor that are not fixed: those of one name are equal within a step.
enum Extent : int64_t { kAny = -1, kTokens = -2, kSequences = -3, kPools = -4, kLayers = -5 };

struct Tensor {
    char const* name;
    nvinfer1::DataType type;
    std::vector<int64_t> dims;  // fixed ones, or an Extent; none: any shape
    bool on_host = false;       // its address is the host's, and the op reads it there
};

struct Launch {
    nvinfer1::PluginTensorDesc const* input_desc;
    void const* const* inputs;
    void* const* outputs;
    void* workspace;
    cudaStream_t stream;
};

class Op {
  public:
    virtual ~Op() = default;
    virtual char const* name() const = 0;
    virtual std::vector<Field> fields() = 0;
    // Throws a PluginError if the fields do not fit each other, or this version.
    virtual void validate() const = 0;
    // Both follow from the fields.
    virtual std::vector<Tensor> inputs() const = 0;
    virtual std::vector<Tensor> outputs() const = 0;
    virtual size_t workspace_bytes() const { return 0; }
    // Whether TensorRT may time it while it builds an engine; what the other ranks take part in cannot run there.
    virtual bool runs_in_build() const { return true; }
    // Before the first launch, not in a graph's capture: what is loaded once for the process. Throws a PluginError.
    virtual void prepare() const {}
    // Shapes are checked, host tensors lie on the host. Neither allocates nor waits, and can be captured in a graph.
    virtual void enqueue(Launch const& launch) const = 0;
    virtual std::unique_ptr<Op> clone() const = 0;

  protected:
    std::string dtype_;  // of the activations

    [[noreturn]] void reject(std::string const& message) const;
    void check_flag(char const* field, int32_t value) const;
    // What the kernels count in int, with room for what they round up: `what`, a product of `fields`.
    void check_count(char const* what, int64_t count, char const* fields) const;
    // float16 or bfloat16, and one that this TensorRT has.
    void check_dtype() const;
    DType dtype() const { return dtype_ == "bfloat16" ? DType::kBFloat16 : DType::kFloat16; }
    nvinfer1::DataType activation_type() const;
};

using OpFactory = std::unique_ptr<Op> (*)();

void check_cuda(cudaError_t error, char const* what);

}  // namespace saw::trt
