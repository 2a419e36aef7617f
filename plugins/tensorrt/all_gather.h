// SawAllGather: the columns that each rank has, side by side on all of them. See all_gather.md.
#pragma once

#include "adapter/op.h"

namespace saw::trt {

class AllGather : public Op {
  public:
    static std::unique_ptr<Op> make() { return std::make_unique<AllGather>(); }

    char const* name() const override;
    std::vector<Field> fields() override;
    void validate() const override;
    std::vector<Tensor> inputs() const override;
    std::vector<Tensor> outputs() const override;
    bool runs_in_build() const override { return false; }
    size_t workspace_bytes() const override;
    void enqueue(Launch const& launch) const override;
    std::unique_ptr<Op> clone() const override { return std::make_unique<AllGather>(*this); }

  private:
    int32_t num_ranks_ = 0;
    int32_t in_features_ = 0, out_features_ = 0;

    size_t row_bytes() const { return sizeof(float) * num_ranks_ * size_t(in_features_); }
    // Of the workspace: more rows are gathered one part after the other.
    int rows_at_once() const;
};

}  // namespace saw::trt
