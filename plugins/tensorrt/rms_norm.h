// SawRmsNorm: a residual's sum, and the norm after it. See rms_norm.md.
#pragma once

#include "adapter/row_op.h"

namespace saw::trt {

class RmsNorm : public RowOp {
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

}  // namespace saw::trt
