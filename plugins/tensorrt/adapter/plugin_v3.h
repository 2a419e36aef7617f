// Any op as an IPluginV3: TensorRT 10 and 11.
#pragma once

#include "plugin_core.h"

#if NV_TENSORRT_MAJOR >= 10

namespace saw::trt {

class PluginV3 : public nvinfer1::IPluginV3,
                 public nvinfer1::IPluginV3OneCore,
                 public nvinfer1::IPluginV3OneBuild,
                 public nvinfer1::IPluginV3OneRuntime {
  public:
    explicit PluginV3(PluginCore core) : core_(std::move(core)), fields_(FieldList::serialized(core_.op())) {}
    PluginV3(PluginV3 const& other) : PluginV3(other.core_) {}

    // IPluginV3
    nvinfer1::IPluginCapability* getCapabilityInterface(nvinfer1::PluginCapabilityType type) noexcept override;
    nvinfer1::IPluginV3* clone() noexcept override;

    // IPluginV3OneCore
    char const* getPluginName() const noexcept override { return core_.op().name(); }
    char const* getPluginVersion() const noexcept override;
    char const* getPluginNamespace() const noexcept override;

    // IPluginV3OneBuild
    int32_t configurePlugin(nvinfer1::DynamicPluginTensorDesc const* inputs, int32_t num_inputs,
                            nvinfer1::DynamicPluginTensorDesc const* outputs, int32_t num_outputs) noexcept override;
    int32_t getOutputDataTypes(nvinfer1::DataType* output_types, int32_t num_outputs,
                               nvinfer1::DataType const* input_types, int32_t num_inputs) const noexcept override;
    int32_t getOutputShapes(nvinfer1::DimsExprs const* inputs, int32_t num_inputs,
                            nvinfer1::DimsExprs const* shape_inputs, int32_t num_shape_inputs,
                            nvinfer1::DimsExprs* outputs, int32_t num_outputs,
                            nvinfer1::IExprBuilder& builder) noexcept override;
    bool supportsFormatCombination(int32_t pos, nvinfer1::DynamicPluginTensorDesc const* descs, int32_t num_inputs,
                                   int32_t num_outputs) noexcept override;
    int32_t getNbOutputs() const noexcept override { return core_.num_outputs(); }
    size_t getWorkspaceSize(nvinfer1::DynamicPluginTensorDesc const* inputs, int32_t num_inputs,
                            nvinfer1::DynamicPluginTensorDesc const* outputs,
                            int32_t num_outputs) const noexcept override;

    // IPluginV3OneRuntime
    int32_t onShapeChange(nvinfer1::PluginTensorDesc const* inputs, int32_t num_inputs,
                          nvinfer1::PluginTensorDesc const* outputs, int32_t num_outputs) noexcept override;
    int32_t enqueue(nvinfer1::PluginTensorDesc const* input_desc, nvinfer1::PluginTensorDesc const* output_desc,
                    void const* const* inputs, void* const* outputs, void* workspace,
                    cudaStream_t stream) noexcept override;
    nvinfer1::IPluginV3* attachToContext(nvinfer1::IPluginResourceContext* context) noexcept override;
    nvinfer1::PluginFieldCollection const* getFieldsToSerialize() noexcept override { return fields_.collection(); }

  private:
    PluginCore core_;
    FieldList fields_;
};

class PluginCreatorV3 : public nvinfer1::IPluginCreatorV3One {
  public:
    explicit PluginCreatorV3(OpFactory factory);

    nvinfer1::IPluginV3* createPlugin(char const* name, nvinfer1::PluginFieldCollection const* fields,
                                      nvinfer1::TensorRTPhase phase) noexcept override;
    nvinfer1::PluginFieldCollection const* getFieldNames() noexcept override { return fields_.collection(); }
    char const* getPluginName() const noexcept override { return example_->name(); }
    char const* getPluginVersion() const noexcept override;
    char const* getPluginNamespace() const noexcept override;

  private:
    OpFactory factory_;
    std::unique_ptr<Op> example_;
    FieldList fields_;
};

}  // namespace saw::trt

#endif
