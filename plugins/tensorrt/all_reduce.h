// SawAllReduce: the sum over an engine's ranks. See all_reduce.md.
#pragma once

#include "adapter/row_op.h"

namespace saw::trt {

class AllReduce : public RowOp {
  public:
    static std::unique_ptr<Op> make() { return std::make_unique<AllReduce>(); }

    char const* name() const override;
    std::vector<Field> fields() override;
    void validate() const override;
    std::vector<Tensor> inputs() const override;
    std::vector<Tensor> outputs() const override;
    bool runs_in_build() const override { return false; }
    void enqueue(Launch const& launch) const override;
    std::unique_ptr<Op> clone() const override { return std::make_unique<AllReduce>(*this); }

  private:
    int32_t num_ranks_ = 0;
};

}  // namespace saw::trt
