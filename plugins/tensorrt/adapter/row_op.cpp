#include "row_op.h"

#include <cmath>

#include "names.h"

namespace saw::trt {

std::vector<Field> RowOp::fields() {
    return {{names::kDtype, &dtype_, true}, {names::kHiddenSize, &hidden_size_, true}};
}

void RowOp::validate() const {
    check_dtype();
    if (hidden_size_ < 1) reject("hidden_size is " + std::to_string(hidden_size_) + ": it must be at least 1");
    check_count("the numbers of a row", hidden_size_, names::kHiddenSize);
}

void RowOp::check_epsilon(float epsilon) const {
    if (!(std::isfinite(epsilon) && epsilon >= 0.0f))
        reject("epsilon is " + std::to_string(epsilon) + ": it must be finite and at least 0");
}

}  // namespace saw::trt
