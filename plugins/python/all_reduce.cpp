#include "saw/all_reduce/params.h"

#include <pybind11/stl.h>

#include <algorithm>
#include <optional>
#include <stdexcept>
#include <vector>

#include "bindings.h"

namespace saw::python {

namespace {

Ranks make_ranks(int rank, std::vector<Address> const& peers, int size, Address nccl, size_t one_shot_bytes) {
    if (!peers.empty() && (peers.size() != size_t(size) || size > kMaxRanks))
        throw std::invalid_argument("there is not one buffer for each rank, or there are too many ranks");
    Ranks ranks{rank, size, at<void>(nccl), peers.empty() ? 0 : one_shot_bytes, {}};
    std::transform(peers.begin(), peers.end(), ranks.peers, at<uint8_t>);
    return ranks;
}

int set_ranks(int device, std::optional<Ranks> const& ranks) {
    return saw_set_ranks(device, ranks ? &*ranks : nullptr);
}

int all_reduce(Ranks const& ranks, Address x, Address y, size_t count, DType dtype, int device, Address stream) {
    DeviceGuard const guard(device);
    return saw_all_reduce(ranks, at<void const>(x), at<void>(y), count, dtype, at<CUstream_st>(stream));
}

int all_reduce_norm(Ranks const& ranks, Address x, Address residual, Address weight, Address y, Address sum,
                    int num_rows, int width, float epsilon, DType dtype, int device, Address stream) {
    DeviceGuard const guard(device);
    RmsNormParams p{};
    p.x = at<void const>(x);
    p.residual = at<void const>(residual);
    p.weight = at<float const>(weight);
    p.y = at<void>(y);
    p.sum = at<void>(sum);
    p.num_rows = num_rows;
    p.num_heads = p.num_normed = 1;
    p.width = width;
    p.epsilon = epsilon;
    p.dtype = dtype;
    return saw_all_reduce_norm(ranks, p, at<CUstream_st>(stream));
}

}  // namespace

void add_all_reduce(py::module_& m) {
    m.attr("MAX_RANKS") = kMaxRanks;
    py::class_<Ranks>(m, "Ranks")
        .def(py::init(&make_ranks), py::kw_only(), py::arg("rank"), py::arg("peers"), py::arg("size"), py::arg("nccl"),
             py::arg("one_shot_bytes"));
    m.def("all_reduce_buffer_bytes", &saw_all_reduce_buffer_bytes, py::arg("size"));
    m.def("set_ranks", &set_ranks, py::kw_only(), py::arg("device"), py::arg("ranks"));
    m.def("all_reduce", &all_reduce, ReleaseGil(), py::kw_only(), py::arg("ranks"), py::arg("x"), py::arg("y"),
          py::arg("count"), py::arg("dtype"), py::arg("device"), py::arg("stream"));
    m.def("all_reduce_norm", &all_reduce_norm, ReleaseGil(), py::kw_only(), py::arg("ranks"), py::arg("x"),
          py::arg("residual"), py::arg("weight"), py::arg("y"), py::arg("sum"), py::arg("num_rows"), py::arg("width"),
          py::arg("epsilon"), py::arg("dtype"), py::arg("device"), py::arg("stream"));
}

}  // namespace saw::python
