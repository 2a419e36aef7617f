// SawLookup: rows of a table, which TensorRT's compilers do not see. See SawLookup.md.
#pragma once

#include "op.h"

namespace saw::trt {

class Lookup : public Op {
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
    int32_t hidden_size_ = 0;
    std::string dtype_;
};

}  // namespace saw::trt
