// What the two adapters do alike: an op after checks of its tensors, and the border that no exception crosses.
#pragma once

#include <exception>

#include "fields.h"
#include "logging.h"

namespace saw::trt {

// Runs `body`; what it throws becomes one line in TensorRT's log, and `otherwise` the result.
template <typename Body, typename Result>
Result guarded(Result otherwise, Body&& body) noexcept {
    try {
        return body();
    } catch (std::exception const& e) {
        log_error(e.what());
    } catch (...) {
        log_error("saw_trtllm plugins: unknown exception");
    }
    return otherwise;
}

// While an engine is built, TensorRT may time a plugin on memory of its own; an engine runs on the runtime's.
enum class Phase { kBuild, kRun };

class PluginCore {
  public:
    PluginCore(std::unique_ptr<Op> op, Phase phase);
    PluginCore(PluginCore const& other) : PluginCore(other.op_->clone(), other.phase_) {}

    Op& op() const { return *op_; }
    int32_t num_outputs() const { return int32_t(outputs_.size()); }
    nvinfer1::DataType output_type(int32_t output) const { return outputs_.at(output).type; }
    nvinfer1::DimsExprs output_dims(int32_t output, nvinfer1::DimsExprs const* inputs, int32_t num_inputs,
                                    nvinfer1::IExprBuilder& builder) const;
    // One combination of types and formats, so that nothing is left to time.
    bool supports(int32_t pos, nvinfer1::PluginTensorDesc const& desc, int32_t num_inputs, int32_t num_outputs) const;
    // A dimension of -1 is not known yet and fits.
    void check_shapes(nvinfer1::PluginTensorDesc const* inputs, int32_t num_inputs) const;
    void check_shapes(nvinfer1::DynamicPluginTensorDesc const* inputs, int32_t num_inputs) const;
    size_t workspace_bytes() const;
    void enqueue(Launch const& launch);

  private:
    std::unique_ptr<Op> op_;
    Phase phase_;
    std::vector<Tensor> inputs_, outputs_;
    std::vector<void const*> on_host_;  // of each input, the address that was last seen to be the host's

    void check_count(int32_t num_inputs) const;
    // False if TensorRT is timing: the host tensors hold nothing.
    bool host_tensors_are_there(Launch const& launch);
};

}  // namespace saw::trt
