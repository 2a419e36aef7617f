// SawAllReduce: the sum over an engine's ranks, and a norm after it. See all_reduce.md.
#pragma once

#include "adapter/row_op.h"
#include "saw/all_reduce/params.h"

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
    enum Input { kX, kWeight, kResidual };
    enum Output { kY, kSum };

    // Of the sum alone, on this launch's ranks.
    void reduce(Ranks const& ranks, Launch const& launch, void* y) const;
    Tensor rows(char const* name) const;

    int32_t num_ranks_ = 0;
    int32_t use_norm_ = 0;
    float epsilon_ = 0.0f;
};

}  // namespace saw::trt
