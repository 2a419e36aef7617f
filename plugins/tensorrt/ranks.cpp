#include "ranks.h"

namespace saw::trt {

void check_num_ranks(Op const& op, int32_t num_ranks) {
    if (num_ranks < 2)
        throw PluginError(std::string(op.name()) + ": num_ranks is " + std::to_string(num_ranks) +
                          ": it must be at least 2");
}

Ranks const& ranks_of_device(Op const& op, int32_t num_ranks) {
    int device = 0;
    saw_get_device(&device);  // if it fails, the first launch says why
    Ranks const* const found = saw_get_ranks(device);
    int const size = found == nullptr ? 1 : found->size;
    if (size != num_ranks)
        throw PluginError(std::string(op.name()) + ": the engine is split over " + std::to_string(num_ranks) +
                          " ranks and the runtime gave GPU " + std::to_string(device) + " a group of " +
                          std::to_string(size) + ": call saw_set_ranks before the first step");
    return *found;
}

}  // namespace saw::trt
