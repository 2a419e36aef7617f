// The choice of next tokens, as host functions; common/library.h says what is true of all of them.
#pragma once

#include <cstddef>
#include <cstdint>

#include "saw/common/library.h"

namespace saw {

// A token whose logit changes before the choice. Each token at most once in a sequence's list.
struct ListedToken {
    int32_t token;
    int32_t count;  // in the text so far; or one of those below
    float bias;     // added to the logit, before penalties
    float logit;    // scratch: what the kernel puts back
};
constexpr int kBanned = -1;  // may not come
constexpr int kUnseen = -2;  // neither in the prompt nor in the text: biased alone

enum class Draw : int32_t {
    kNothing = 0,       // token -1
    kGreedy = 1,        // the likeliest token, the first of equals
    kByToken = 2,       // of all tokens, cumulated in their order
    kByLikelihood = 3,  // of those that top_k and top_p leave, cumulated from the likeliest on, equals by token
};

// How to choose one sequence's next token, as saw_trtllm/runtime/sampling.py says.
struct SampleRow {
    uint64_t seed;
    uint64_t index;  // number of the draw
    double temperature;
    double top_p;  // below 1: keep the likeliest tokens that hold this share
    double min_p;  // keep the tokens that are at least so likely, times the likeliest; 0: all
    double repetition_penalty;
    double presence_penalty;
    double frequency_penalty;
    // [num_listed]: the banned and the biased tokens, and where there are penalties those of prompt and text
    ListedToken* listed;
    uint32_t const* mask;  // [ceil(vocab_size / 32)]: bit i % 32 of word i / 32: whether token i may come; or null
    int32_t num_listed;
    int32_t top_k;  // 0: all
    Draw draw;
    int32_t num_logprobs;  // 0: none; 1: the chosen token's; 1 + k: those of the k likeliest too
};

// The next token of each sequence, in one launch. What is chosen depends neither on the other rows nor on their number.
struct SampleParams {
    float* logits;            // [*, vocab_size]; changed for the listed tokens while the kernel runs, and put back
    int32_t const* row_ends;  // [num_rows]: row i draws from row row_ends[i] - 1 of the logits; or null: from row i
    SampleRow const* rows;    // [num_rows]
    int32_t* tokens;          // [num_rows]
    double* logprobs;  // [num_rows]: log-probability under the model, before penalties and cuts, of those that want it
    // [num_rows, max_top]: the likeliest tokens under the model, the first of equals first, and their
    // log-probabilities, so many as the row wants and there are; or null
    int32_t* top_tokens;
    double* top_logprobs;
    int max_top;
    int num_rows;
    int vocab_size;  // at most kMaxVocab
};
constexpr int kMaxVocab = 1 << 18;
SAW_API cudaError_t saw_sample(SampleParams const& params, cudaStream_t stream);

// Input ids of -1 - j become the token of row j of the last saw_sample().
SAW_API cudaError_t saw_resolve_tokens(int32_t* input_ids, int num_tokens, int32_t const* tokens, cudaStream_t stream);

}  // namespace saw
