#include "plugin_v3.h"

#include "names.h"

#if NV_TENSORRT_MAJOR >= 10

namespace saw::trt {

nvinfer1::IPluginCapability* PluginV3::getCapabilityInterface(nvinfer1::PluginCapabilityType type) noexcept {
    switch (type) {
        case nvinfer1::PluginCapabilityType::kCORE:
            return static_cast<nvinfer1::IPluginV3OneCore*>(this);
        case nvinfer1::PluginCapabilityType::kBUILD:
            return static_cast<nvinfer1::IPluginV3OneBuild*>(this);
        case nvinfer1::PluginCapabilityType::kRUNTIME:
            return static_cast<nvinfer1::IPluginV3OneRuntime*>(this);
    }
    return nullptr;
}

nvinfer1::IPluginV3* PluginV3::clone() noexcept {
    return guarded(static_cast<PluginV3*>(nullptr), [&] { return new PluginV3(*this); });
}

char const* PluginV3::getPluginVersion() const noexcept { return names::kVersion; }

char const* PluginV3::getPluginNamespace() const noexcept { return names::kNamespace; }

int32_t PluginV3::configurePlugin(nvinfer1::DynamicPluginTensorDesc const* inputs, int32_t num_inputs,
                                  nvinfer1::DynamicPluginTensorDesc const*, int32_t) noexcept {
    return guarded(1, [&] {
        core_.check_shapes(inputs, num_inputs);
        return 0;
    });
}

int32_t PluginV3::getOutputDataTypes(nvinfer1::DataType* output_types, int32_t num_outputs, nvinfer1::DataType const*,
                                     int32_t) const noexcept {
    return guarded(1, [&] {
        for (int i = 0; i < num_outputs; ++i) output_types[i] = core_.output_type(i);
        return 0;
    });
}

int32_t PluginV3::getOutputShapes(nvinfer1::DimsExprs const* inputs, int32_t num_inputs, nvinfer1::DimsExprs const*,
                                  int32_t, nvinfer1::DimsExprs* outputs, int32_t num_outputs,
                                  nvinfer1::IExprBuilder& builder) noexcept {
    return guarded(1, [&] {
        for (int i = 0; i < num_outputs; ++i) outputs[i] = core_.output_dims(i, inputs, num_inputs, builder);
        return 0;
    });
}

bool PluginV3::supportsFormatCombination(int32_t pos, nvinfer1::DynamicPluginTensorDesc const* descs,
                                         int32_t num_inputs, int32_t num_outputs) noexcept {
    return guarded(false, [&] { return core_.supports(pos, descs[pos].desc, num_inputs, num_outputs); });
}

size_t PluginV3::getWorkspaceSize(nvinfer1::DynamicPluginTensorDesc const*, int32_t,
                                  nvinfer1::DynamicPluginTensorDesc const*, int32_t) const noexcept {
    return guarded(size_t(0), [&] { return core_.workspace_bytes(); });
}

int32_t PluginV3::onShapeChange(nvinfer1::PluginTensorDesc const* inputs, int32_t num_inputs,
                                nvinfer1::PluginTensorDesc const*, int32_t) noexcept {
    return guarded(1, [&] {
        core_.check_shapes(inputs, num_inputs);
        return 0;
    });
}

int32_t PluginV3::enqueue(nvinfer1::PluginTensorDesc const* input_desc, nvinfer1::PluginTensorDesc const*,
                          void const* const* inputs, void* const* outputs, void* workspace,
                          cudaStream_t stream) noexcept {
    return guarded(1, [&] {
        core_.enqueue({input_desc, inputs, outputs, workspace, stream});
        return 0;
    });
}

// Contexts share nothing of their own, and nothing is allocated for one.
nvinfer1::IPluginV3* PluginV3::attachToContext(nvinfer1::IPluginResourceContext*) noexcept {
    return guarded(static_cast<PluginV3*>(nullptr), [&] {
        core_.op().prepare();
        return new PluginV3(*this);
    });
}

PluginCreatorV3::PluginCreatorV3(OpFactory factory)
    : factory_(factory), example_(factory()), fields_(FieldList::advertised(*example_)) {}

nvinfer1::IPluginV3* PluginCreatorV3::createPlugin(char const*, nvinfer1::PluginFieldCollection const* fields,
                                                   nvinfer1::TensorRTPhase phase) noexcept {
    return guarded(static_cast<PluginV3*>(nullptr), [&] {
        return phase == nvinfer1::TensorRTPhase::kRUNTIME
                   ? new PluginV3(PluginCore(make_op_of_engine(factory_, fields), Phase::kRun))
                   : new PluginV3(PluginCore(make_op(factory_, fields), Phase::kBuild));
    });
}

char const* PluginCreatorV3::getPluginVersion() const noexcept { return names::kVersion; }

char const* PluginCreatorV3::getPluginNamespace() const noexcept { return names::kNamespace; }

}  // namespace saw::trt

#endif
