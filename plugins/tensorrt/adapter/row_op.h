// What the operations on rows of activations share: dtype and width. For each, TensorRT would compile several kernels
// in every layer.
#pragma once

#include "op.h"
#include "saw/common/pool.h"

namespace saw::trt {

class RowOp : public Op {
  public:
    std::vector<Field> fields() override;
    void validate() const override;

  protected:
    // Of a norm.
    void check_epsilon(float epsilon) const;

    int32_t hidden_size_ = 0;
};

}  // namespace saw::trt
