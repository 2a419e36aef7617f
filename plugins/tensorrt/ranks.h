// What the operations between ranks share: the ranks that the runtime gave this device.
#pragma once

#include "adapter/op.h"
#include "saw/all_reduce/params.h"

namespace saw::trt {

// Throws a PluginError if an op of less than two ranks was asked for.
void check_num_ranks(Op const& op, int32_t num_ranks);
// Those of the current device. Throws a PluginError if there are none, or another number.
Ranks const& ranks_of_device(Op const& op, int32_t num_ranks);

}  // namespace saw::trt
