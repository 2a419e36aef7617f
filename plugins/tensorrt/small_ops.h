// SawLookup, SawRmsNorm, SawSiluMul: a kernel each, for which TensorRT would compile several in every layer. See their
// pages.
#pragma once

#include "op.h"
#include "saw/ops.h"

namespace saw::trt {

class SmallOp : public Op {
  public:
    std::vector<Field> fields() override;
    void validate() const override;

  protected:
    std::string dtype_;
    int32_t hidden_size_ = 0;

    nvinfer1::DataType activation_type() const { return Op::activation_type(dtype_); }
    DType dtype() const { return dtype_ == "bfloat16" ? DType::kBFloat16 : DType::kFloat16; }
};

class Lookup : public SmallOp {
  public:
    static std::unique_ptr<Op> make() { return std::make_unique<Lookup>(); }

    char const* name() const override;
    std::vector<Field> fields() override;
    void validate() const override;
    std::vector<Tensor> inputs() const override;
    std::vector<Tensor> outputs() const override;
    void enqueue(Launch const& launch) const override;
    std::unique_ptr<Op> clone() const override { return std::make_unique<Lookup>(*this); }

  private:
    enum Input { kRows, kWeight };

    int32_t vocab_size_ = 0;
};

class RmsNorm : public SmallOp {
  public:
    static std::unique_ptr<Op> make() { return std::make_unique<RmsNorm>(); }

    char const* name() const override;
    std::vector<Field> fields() override;
    void validate() const override;
    std::vector<Tensor> inputs() const override;
    std::vector<Tensor> outputs() const override;
    void enqueue(Launch const& launch) const override;
    std::unique_ptr<Op> clone() const override { return std::make_unique<RmsNorm>(*this); }

  private:
    enum Input { kX, kWeight, kResidual };

    float epsilon_ = 0.0f;
    int32_t use_residual_ = 0;
    int32_t num_heads_ = 1;
    int32_t num_normed_ = 1;

    Tensor rows(char const* name) const;
};

class SiluMul : public SmallOp {
  public:
    static std::unique_ptr<Op> make() { return std::make_unique<SiluMul>(); }

    char const* name() const override;
    std::vector<Tensor> inputs() const override;
    std::vector<Tensor> outputs() const override;
    void enqueue(Launch const& launch) const override;
    std::unique_ptr<Op> clone() const override { return std::make_unique<SiluMul>(*this); }
};

}  // namespace saw::trt
