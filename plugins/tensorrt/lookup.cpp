#include "lookup.h"

#include "adapter/names.h"
#include "saw/lookup/params.h"

namespace saw::trt {

char const* Lookup::name() const { return names::kLookup; }

std::vector<Field> Lookup::fields() {
    auto fields = RowOp::fields();
    fields.push_back({names::kVocabSize, &vocab_size_, true});
    return fields;
}

void Lookup::validate() const {
    RowOp::validate();
    if (vocab_size_ < 1) reject("vocab_size is " + std::to_string(vocab_size_) + ": it must be at least 1");
}

std::vector<Tensor> Lookup::inputs() const {
    return {{names::kRows, nvinfer1::DataType::kINT32, {kTokens}},
            {names::kWeight, activation_type(), {vocab_size_, hidden_size_}}};
}

std::vector<Tensor> Lookup::outputs() const { return {{names::kY, activation_type(), {kTokens, hidden_size_}}}; }

void Lookup::enqueue(Launch const& launch) const {
    check_cuda(saw_lookup(launch.inputs[kWeight], static_cast<int32_t const*>(launch.inputs[kRows]), launch.outputs[0],
                          int(launch.input_desc[kRows].dims.d[0]), vocab_size_, hidden_size_, launch.stream),
               "lookup");
}

}  // namespace saw::trt
