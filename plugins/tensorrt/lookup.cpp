#include "lookup.h"

#include "names.h"
#include "saw/ops.h"

namespace saw::trt {

char const* Lookup::name() const { return names::kLookup; }

std::vector<Field> Lookup::fields() {
    return {{names::kDtype, &dtype_, true},
            {names::kVocabSize, &vocab_size_, true},
            {names::kHiddenSize, &hidden_size_, true}};
}

void Lookup::validate() const {
    check_dtype(dtype_);
    if (vocab_size_ < 1 || hidden_size_ < 1)
        refuse("vocab_size is " + std::to_string(vocab_size_) + " and hidden_size " + std::to_string(hidden_size_) +
               ": both must be at least 1");
}

std::vector<Tensor> Lookup::inputs() const {
    return {{names::kRows, nvinfer1::DataType::kINT32, {kTokens}},
            {names::kWeight, activation_type(dtype_), {vocab_size_, hidden_size_}}};
}

std::vector<Tensor> Lookup::outputs() const { return {{names::kY, activation_type(dtype_), {kTokens, hidden_size_}}}; }

void Lookup::enqueue(Launch const& launch) const {
    check_cuda(lookup(launch.inputs[kWeight], static_cast<int32_t const*>(launch.inputs[kRows]), launch.outputs[0],
                      int(launch.input_desc[kRows].dims.d[0]), vocab_size_, hidden_size_, launch.stream),
               "lookup");
}

}  // namespace saw::trt
