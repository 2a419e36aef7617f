// SawGemm: a linear layer, or a gate's two, whose weights TensorRT's compilers do not see. See gemm.md.
#pragma once

#include "adapter/op.h"

namespace saw::trt {

class Gemm : public Op {
  public:
    static std::unique_ptr<Op> make() { return std::make_unique<Gemm>(); }

    char const* name() const override;
    std::vector<Field> fields() override;
    void validate() const override;
    std::vector<Tensor> inputs() const override;
    std::vector<Tensor> outputs() const override;
    size_t workspace_bytes() const override;
    void prepare() const override;
    void enqueue(Launch const& launch) const override;
    std::unique_ptr<Op> clone() const override { return std::make_unique<Gemm>(*this); }

  private:
    enum Input { kX, kWeight, kGate };

    int32_t in_features_ = 0;
    int32_t out_features_ = 0;
    std::string output_dtype_;
    int32_t use_gate_ = 0;

    int64_t slab_rows() const;
    // y = x · weightᵀ of some rows of x, by cuBLASLt.
    void multiply(Launch const& launch, int64_t first, int64_t rows, void const* weight, void* y) const;
    void multiply_gated(Launch const& launch) const;
};

}  // namespace saw::trt
