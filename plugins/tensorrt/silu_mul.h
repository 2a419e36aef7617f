// SawSiluMul: the gate of an MLP. See silu_mul.md.
#pragma once

#include "adapter/row_op.h"

namespace saw::trt {

class SiluMul : public RowOp {
  public:
    static std::unique_ptr<Op> make() { return std::make_unique<SiluMul>(); }

    char const* name() const override;
    std::vector<Tensor> inputs() const override;
    std::vector<Tensor> outputs() const override;
    void enqueue(Launch const& launch) const override;
    std::unique_ptr<Op> clone() const override { return std::make_unique<SiluMul>(*this); }
};

}  // namespace saw::trt
