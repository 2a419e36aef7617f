// What both operations share: the heads, the pool, and how a step describes itself.
#pragma once

#include "op.h"
#include "saw/common/pool.h"

namespace saw::trt {

class PagedOp : public Op {
  public:
    std::vector<Field> fields() override;
    void validate() const override;

  protected:
    int32_t layer_idx_ = 0;
    int32_t num_heads_ = 0;
    int32_t num_kv_heads_ = 0;
    int32_t head_dim_ = 0;
    int32_t tokens_per_block_ = 0;
    std::string kv_;

    CacheType cache() const;

    // The inputs that say where a layer's rows lie: three that follow each other.
    static std::vector<Tensor> pool_inputs();
    // This layer's pool, from those inputs of a launch.
    PagedPool pool(Launch const& launch, int first_input) const;
};

}  // namespace saw::trt
