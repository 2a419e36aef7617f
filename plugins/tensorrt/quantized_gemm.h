// SawQuantizedGemm: a linear layer whose weight has 4 or 8 bits. See quantized_gemm.md.
#pragma once

#include "adapter/op.h"
#include "saw/quantized_gemm/params.h"

namespace saw::trt {

class QuantizedGemm : public Op {
  public:
    static std::unique_ptr<Op> make() { return std::make_unique<QuantizedGemm>(); }

    char const* name() const override;
    std::vector<Field> fields() override;
    void validate() const override;
    std::vector<Tensor> inputs() const override;
    std::vector<Tensor> outputs() const override;
    size_t workspace_bytes() const override;
    void prepare() const override;
    void enqueue(Launch const& launch) const override;
    std::unique_ptr<Op> clone() const override { return std::make_unique<QuantizedGemm>(*this); }

  private:
    enum Input { kX, kWeight, kScales };

    int32_t in_features_ = 0;
    int32_t out_features_ = 0;
    int32_t group_size_ = kChunk;
    std::string weight_type_;
    int32_t quantize_input_ = 0;

    WeightType type() const { return weight_type_ == "fp8" ? WeightType::kFloat8 : WeightType::kInt4; }
    int slab_rows() const;
    int input_rows() const;
    void multiply_many(Launch const& launch, PackedWeight const& weight) const;
    bool multiply_float8(Launch const& launch, PackedWeight const& weight) const;
};

}  // namespace saw::trt
