// SawLookup: an embedding. See lookup.md.
#pragma once

#include "adapter/row_op.h"

namespace saw::trt {

class Lookup : public RowOp {
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

}  // namespace saw::trt
