#include "saw/all_gather/params.h"

#include "bindings.h"

namespace saw::python {

namespace {

int all_gather(Address parts, Address out, int num_ranks, int num_rows, int width, int out_width, int device,
               Address stream) {
    DeviceGuard const guard(device);
    return saw_all_gather(at<float const>(parts), at<float>(out), num_ranks, num_rows, width, out_width,
                          at<CUstream_st>(stream));
}

}  // namespace

void add_all_gather(py::module_& m) {
    m.def("all_gather", &all_gather, ReleaseGil(), py::kw_only(), py::arg("parts"), py::arg("out"),
          py::arg("num_ranks"), py::arg("num_rows"), py::arg("width"), py::arg("out_width"), py::arg("device"),
          py::arg("stream"));
}

}  // namespace saw::python
