#include "plugin_v2.h"

#include "names.h"

#if NV_TENSORRT_MAJOR < 11

namespace saw::trt {

namespace {

void assign(std::string& target, char const* value) noexcept {
    guarded(0, [&] {
        target = value == nullptr ? "" : value;
        return 0;
    });
}

}  // namespace

nvinfer1::IPluginV2DynamicExt* PluginV2::clone() const noexcept {
    return guarded<>(static_cast<PluginV2*>(nullptr), [&] { return new PluginV2(*this); });
}

nvinfer1::DimsExprs PluginV2::getOutputDimensions(int32_t output, nvinfer1::DimsExprs const* inputs, int32_t num_inputs,
                                                  nvinfer1::IExprBuilder& builder) noexcept {
    nvinfer1::DimsExprs none{};
    none.nbDims = -1;
    return guarded(none, [&] { return core_.output_dims(output, inputs, num_inputs, builder); });
}

bool PluginV2::supportsFormatCombination(int32_t pos, nvinfer1::PluginTensorDesc const* descs, int32_t num_inputs,
                                         int32_t num_outputs) noexcept {
    return guarded(false, [&] { return core_.supports(pos, descs[pos], num_inputs, num_outputs); });
}

// Cannot fail: enqueue() will say it again.
void PluginV2::configurePlugin(nvinfer1::DynamicPluginTensorDesc const* inputs, int32_t num_inputs,
                               nvinfer1::DynamicPluginTensorDesc const*, int32_t) noexcept {
    guarded(0, [&] {
        core_.check_shapes(inputs, num_inputs);
        return 0;
    });
}

size_t PluginV2::getWorkspaceSize(nvinfer1::PluginTensorDesc const*, int32_t, nvinfer1::PluginTensorDesc const*,
                                  int32_t) const noexcept {
    return guarded(size_t(0), [&] { return core_.workspace_bytes(); });
}

int32_t PluginV2::enqueue(nvinfer1::PluginTensorDesc const* input_desc, nvinfer1::PluginTensorDesc const*,
                          void const* const* inputs, void* const* outputs, void* workspace,
                          cudaStream_t stream) noexcept {
    return guarded(1, [&] {
        core_.enqueue({input_desc, inputs, outputs, workspace, stream});
        return 0;
    });
}

int32_t PluginV2::initialize() noexcept {
    return guarded(1, [&] {
        core_.op().prepare();
        return 0;
    });
}

nvinfer1::DataType PluginV2::getOutputDataType(int32_t output, nvinfer1::DataType const*, int32_t) const noexcept {
    return guarded(nvinfer1::DataType::kFLOAT, [&] { return core_.output_type(output); });
}

size_t PluginV2::getSerializationSize() const noexcept {
    return guarded(size_t(0), [&] { return serialized_bytes(*FieldList::serialized(core_.op()).collection()); });
}

void PluginV2::serialize(void* buffer) const noexcept {
    guarded(0, [&] {
        trt::serialize(*FieldList::serialized(core_.op()).collection(), buffer);
        return 0;
    });
}

void PluginV2::setPluginNamespace(char const* name_space) noexcept { assign(namespace_, name_space); }

PluginCreatorV2::PluginCreatorV2(OpFactory factory, char const* version)
    : factory_(factory),
      example_(factory()),
      version_(version),
      fields_(FieldList::advertised(*example_)),
      namespace_(names::kNamespace) {}

nvinfer1::IPluginV2* PluginCreatorV2::make(std::unique_ptr<Op> op, Phase phase) const {
    auto plugin = std::make_unique<PluginV2>(PluginCore(std::move(op), phase), version_);
    plugin->setPluginNamespace(namespace_.c_str());
    return plugin.release();
}

nvinfer1::IPluginV2* PluginCreatorV2::createPlugin(char const*,
                                                   nvinfer1::PluginFieldCollection const* fields) noexcept {
    return guarded(static_cast<nvinfer1::IPluginV2*>(nullptr),
                   [&] { return make(make_op(factory_, fields), Phase::kBuild); });
}

nvinfer1::IPluginV2* PluginCreatorV2::deserializePlugin(char const*, void const* data, size_t length) noexcept {
    return guarded(static_cast<nvinfer1::IPluginV2*>(nullptr),
                   [&] { return make(deserialize_op(factory_, data, length), Phase::kRun); });
}

void PluginCreatorV2::setPluginNamespace(char const* name_space) noexcept { assign(namespace_, name_space); }

}  // namespace saw::trt

#endif
