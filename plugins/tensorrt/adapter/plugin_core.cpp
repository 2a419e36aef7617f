#include "plugin_core.h"

namespace saw::trt {

namespace {

using nvinfer1::DataType;
using nvinfer1::PluginTensorDesc;

std::string shape(nvinfer1::Dims const& dims) {
    std::string text;
    for (int i = 0; i < dims.nbDims; ++i) text += (i == 0 ? "" : ", ") + std::to_string(dims.d[i]);
    return "[" + text + "]";
}

std::string extent_name(int64_t extent) {
    switch (extent) {
        case kAny:
            return "any";
        case kTokens:
            return "num_tokens";
        case kSequences:
            return "num_sequences";
        case kPools:
            return "num_pools";
        case kLayers:
            return "num_layers";
        default:
            return std::to_string(extent);
    }
}

std::string shape(std::vector<int64_t> const& dims) {
    std::string text;
    for (int64_t d : dims) text += (text.empty() ? "" : ", ") + extent_name(d);
    return "[" + text + "]";
}

// Extents that inputs share, as the first of them has it; none yet: 0.
class Extents {
  public:
    bool fits(int64_t wanted, int64_t given) {
        if (given < 0 || wanted == kAny) return true;
        if (wanted >= 0) return given == wanted;
        int64_t& known = known_[-wanted];
        if (!seen_[-wanted]) known = given;
        seen_[-wanted] = true;
        return known == given;
    }

  private:
    int64_t known_[6] = {};
    bool seen_[6] = {};
};

void check_shape(Op const& op, Tensor const& tensor, nvinfer1::Dims const& given, Extents& extents) {
    if (tensor.dims.empty()) return;
    bool fits = given.nbDims == int(tensor.dims.size());
    for (int i = 0; fits && i < given.nbDims; ++i) fits = extents.fits(tensor.dims[i], given.d[i]);
    if (!fits)
        throw PluginError(std::string(op.name()) + ": input " + tensor.name + " has shape " + shape(given) +
                          ": it must be " + shape(tensor.dims) + ", each extent the same in all inputs");
}

}  // namespace

PluginCore::PluginCore(std::unique_ptr<Op> op, Phase phase)
    : op_(std::move(op)), phase_(phase), inputs_(op_->inputs()), outputs_(op_->outputs()), on_host_(inputs_.size()) {}

void PluginCore::check_count(int32_t num_inputs) const {
    if (size_t(num_inputs) == inputs_.size()) return;
    std::string names;
    for (Tensor const& t : inputs_) names += (names.empty() ? "" : ", ") + std::string(t.name);
    throw PluginError(std::string(op_->name()) + ": " + std::to_string(num_inputs) + " inputs are connected: connect " +
                      names);
}

nvinfer1::DimsExprs PluginCore::output_dims(int32_t output, nvinfer1::DimsExprs const* inputs, int32_t num_inputs,
                                            nvinfer1::IExprBuilder& builder) const {
    check_count(num_inputs);
    auto const input_extent = [&](int64_t extent) {
        for (int i = 0; i < num_inputs; ++i)
            for (size_t axis = 0; axis < inputs_[i].dims.size(); ++axis)
                if (inputs_[i].dims[axis] == extent && int(axis) < inputs[i].nbDims) return inputs[i].d[axis];
        throw PluginError(std::string(op_->name()) + ": no input gives " + extent_name(extent));
    };
    auto const& dims = outputs_.at(output).dims;
    nvinfer1::DimsExprs result{};
    result.nbDims = int32_t(dims.size());
    for (size_t i = 0; i < dims.size(); ++i)
        result.d[i] = dims[i] >= 0 ? builder.constant(int32_t(dims[i])) : input_extent(dims[i]);
    return result;
}

bool PluginCore::supports(int32_t pos, PluginTensorDesc const& desc, int32_t num_inputs, int32_t num_outputs) const {
    check_count(num_inputs);
    if (num_outputs != int32_t(outputs_.size()) || pos < 0 || pos >= num_inputs + num_outputs) return false;
    Tensor const& tensor = pos < num_inputs ? inputs_[pos] : outputs_[pos - num_inputs];
    return desc.type == tensor.type && desc.format == nvinfer1::TensorFormat::kLINEAR;
}

void PluginCore::check_shapes(PluginTensorDesc const* inputs, int32_t num_inputs) const {
    check_count(num_inputs);
    Extents extents;
    for (int i = 0; i < num_inputs; ++i) check_shape(*op_, inputs_[i], inputs[i].dims, extents);
}

void PluginCore::check_shapes(nvinfer1::DynamicPluginTensorDesc const* inputs, int32_t num_inputs) const {
    check_count(num_inputs);
    Extents extents;
    for (int i = 0; i < num_inputs; ++i) check_shape(*op_, inputs_[i], inputs[i].desc.dims, extents);
}

size_t PluginCore::workspace_bytes() const { return op_->workspace_bytes(); }

bool PluginCore::host_tensors_are_there(Launch const& launch) {
    for (size_t i = 0; i < inputs_.size(); ++i) {
        // Asking the driver costs more than a launch may, and the answer for an address does not change.
        if (!inputs_[i].on_host || (on_host_[i] != nullptr && on_host_[i] == launch.inputs[i])) continue;
        bool const nowhere = launch.inputs[i] == nullptr;
        if (nowhere || !saw_is_host_address(launch.inputs[i])) {
            if (phase_ == Phase::kBuild) return false;
            throw PluginError(std::string(op_->name()) + ": input " + inputs_[i].name + " is bound to " +
                              (nowhere ? "no memory" : "GPU memory") + ": bind a host address");
        }
        on_host_[i] = launch.inputs[i];
    }
    return true;
}

void PluginCore::enqueue(Launch const& launch) {
    check_shapes(launch.input_desc, int32_t(inputs_.size()));
    if (phase_ == Phase::kBuild && !op_->runs_in_build()) return;
    if (host_tensors_are_there(launch)) op_->enqueue(launch);
}

}  // namespace saw::trt
