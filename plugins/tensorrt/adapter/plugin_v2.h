// Any op as an IPluginV2DynamicExt: TensorRT 8.6 to 10.
#pragma once

#include "plugin_core.h"

#if NV_TENSORRT_MAJOR < 11

namespace saw::trt {

class PluginV2 : public nvinfer1::IPluginV2DynamicExt {
  public:
    PluginV2(PluginCore core, char const* version) : core_(std::move(core)), version_(version) {}

    // IPluginV2DynamicExt
    nvinfer1::IPluginV2DynamicExt* clone() const noexcept override;
    nvinfer1::DimsExprs getOutputDimensions(int32_t output, nvinfer1::DimsExprs const* inputs, int32_t num_inputs,
                                            nvinfer1::IExprBuilder& builder) noexcept override;
    bool supportsFormatCombination(int32_t pos, nvinfer1::PluginTensorDesc const* descs, int32_t num_inputs,
                                   int32_t num_outputs) noexcept override;
    void configurePlugin(nvinfer1::DynamicPluginTensorDesc const* inputs, int32_t num_inputs,
                         nvinfer1::DynamicPluginTensorDesc const* outputs, int32_t num_outputs) noexcept override;
    size_t getWorkspaceSize(nvinfer1::PluginTensorDesc const* inputs, int32_t num_inputs,
                            nvinfer1::PluginTensorDesc const* outputs, int32_t num_outputs) const noexcept override;
    int32_t enqueue(nvinfer1::PluginTensorDesc const* input_desc, nvinfer1::PluginTensorDesc const* output_desc,
                    void const* const* inputs, void* const* outputs, void* workspace,
                    cudaStream_t stream) noexcept override;

    // IPluginV2Ext
    nvinfer1::DataType getOutputDataType(int32_t output, nvinfer1::DataType const* input_types,
                                         int32_t num_inputs) const noexcept override;

    // IPluginV2
    char const* getPluginType() const noexcept override { return core_.op().name(); }
    char const* getPluginVersion() const noexcept override { return version_; }
    int32_t getNbOutputs() const noexcept override { return core_.num_outputs(); }
    int32_t initialize() noexcept override;
    void terminate() noexcept override {}
    size_t getSerializationSize() const noexcept override;
    void serialize(void* buffer) const noexcept override;
    void destroy() noexcept override { delete this; }
    void setPluginNamespace(char const* name_space) noexcept override;
    char const* getPluginNamespace() const noexcept override { return namespace_.c_str(); }

  private:
    PluginCore core_;
    char const* version_;
    std::string namespace_;
};

class PluginCreatorV2 : public nvinfer1::IPluginCreator {
  public:
    PluginCreatorV2(OpFactory factory, char const* version);

    char const* getPluginName() const noexcept override { return example_->name(); }
    char const* getPluginVersion() const noexcept override { return version_; }
    nvinfer1::PluginFieldCollection const* getFieldNames() noexcept override { return fields_.collection(); }
    nvinfer1::IPluginV2* createPlugin(char const* name,
                                      nvinfer1::PluginFieldCollection const* fields) noexcept override;
    nvinfer1::IPluginV2* deserializePlugin(char const* name, void const* data, size_t length) noexcept override;
    void setPluginNamespace(char const* name_space) noexcept override;
    char const* getPluginNamespace() const noexcept override { return namespace_.c_str(); }

  private:
    OpFactory factory_;
    std::unique_ptr<Op> example_;
    char const* version_;
    FieldList fields_;
    std::string namespace_;

    nvinfer1::IPluginV2* make(std::unique_ptr<Op> op, Phase phase) const;
};

}  // namespace saw::trt

#endif
