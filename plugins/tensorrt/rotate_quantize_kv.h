// SawRotateQuantizeKV: RoPE, centring, rotation, quantization and the paged write of a step. See
// rotate_quantize_kv.md.
#pragma once

#include "adapter/paged_op.h"

namespace saw::trt {

class RotateQuantizeKv : public PagedOp {
  public:
    static std::unique_ptr<Op> make() { return std::make_unique<RotateQuantizeKv>(); }

    char const* name() const override;
    std::vector<Field> fields() override;
    void validate() const override;
    std::vector<Tensor> inputs() const override;
    std::vector<Tensor> outputs() const override;
    void enqueue(Launch const& launch) const override;
    std::unique_ptr<Op> clone() const override { return std::make_unique<RotateQuantizeKv>(*this); }

  private:
    enum Input { kQkv, kPositionIds, kLastTokenIds, kSequenceLength, kPool, kCosSin = kPool + 3, kOptional };
    enum Output { kQ, kK, kV, kDecodeCounters };

    int32_t hadamard_order_ = 0;
    int32_t rotate_v_ = 0;
    float range_factor_ = 1.0f;
    int32_t use_k_center_ = 0;
    int32_t use_k_frame_ = 0, use_q_frame_ = 0;
};

}  // namespace saw::trt
