// SawInt4PagedAttention: a step's prefills and decodes against the pool. See paged_attention.md.
#pragma once

#include "adapter/paged_op.h"
#include "saw/paged_attention/params.h"

namespace saw::trt {

class Int4PagedAttention : public PagedOp {
  public:
    static std::unique_ptr<Op> make() { return std::make_unique<Int4PagedAttention>(); }

    char const* name() const override;
    std::vector<Field> fields() override;
    void validate() const override;
    std::vector<Tensor> inputs() const override;
    std::vector<Tensor> outputs() const override;
    size_t workspace_bytes() const override;
    void enqueue(Launch const& launch) const override;
    std::unique_ptr<Op> clone() const override { return std::make_unique<Int4PagedAttention>(*this); }

  private:
    enum Input {
        kQ,
        kK,
        kV,
        kDecodeCounters,
        kRequestTypes,
        kLastTokenIds,
        kSequenceLength,
        kPool,
        kWindowSizes = kPool + 3,
        kSinks
    };

    // Of a step: prefills come first, and each decode has one token.
    struct Step {
        int num_tokens, num_sequences, prefill_tokens, prefills;
    };

    float softmax_scale_ = 0.0f;
    float softcap_ = 0.0f;
    int32_t window_ = 0;
    int32_t use_sinks_ = 0;

    Step step(Launch const& launch) const;
    int window(Launch const& launch) const;
    // All but the queries, the output and the sequences.
    void set_shared(AttentionParams& params, Launch const& launch) const;
    void enqueue_prefills(Launch const& launch, Step const& step) const;
    void enqueue_decodes(Launch const& launch, Step const& step) const;
};

}  // namespace saw::trt
