// An op's fields to and from TensorRT's PluginField and, for V2 engines, bytes.
#pragma once

#include "op.h"

namespace saw::trt {

// An op's fields as TensorRT's structs, which point into it: the op outlives the list and does not change.
class FieldList {
  public:
    // Names and types only: what a creator advertises.
    static FieldList advertised(Op& op) { return FieldList(op, false); }
    // Values too, the format's version and the workspace: what an engine keeps.
    static FieldList serialized(Op& op) { return FieldList(op, true); }

    // The structs point to each other.
    FieldList(FieldList const&) = delete;
    FieldList& operator=(FieldList const&) = delete;

    nvinfer1::PluginFieldCollection const* collection() const { return &collection_; }

  private:
    int32_t format_version_, workspace_bytes_;
    std::vector<nvinfer1::PluginField> fields_;
    nvinfer1::PluginFieldCollection collection_{};

    FieldList(Op& op, bool for_engine);
};

// An op from the fields that a network definition gives, or from those that an engine kept; a PluginError if they do
// not fit.
std::unique_ptr<Op> make_op(OpFactory factory, nvinfer1::PluginFieldCollection const* fields);
std::unique_ptr<Op> make_op_of_engine(OpFactory factory, nvinfer1::PluginFieldCollection const* fields);

// The same through bytes.
size_t serialized_bytes(nvinfer1::PluginFieldCollection const& fields);
void serialize(nvinfer1::PluginFieldCollection const& fields, void* buffer);
std::unique_ptr<Op> deserialize_op(OpFactory factory, void const* data, size_t length);

}  // namespace saw::trt
