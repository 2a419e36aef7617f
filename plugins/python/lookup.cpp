#include "saw/lookup/params.h"

#include "bindings.h"

namespace saw::python {

namespace {

int lookup(Address table, Address rows, Address out, int num_tokens, int num_rows, int width, int device,
           Address stream) {
    DeviceGuard const guard(device);
    return saw_lookup(at<void const>(table), at<int32_t const>(rows), at<void>(out), num_tokens, num_rows, width,
                      at<CUstream_st>(stream));
}

}  // namespace

void add_lookup(py::module_& m) {
    m.def("lookup", &lookup, ReleaseGil(), py::kw_only(), py::arg("table"), py::arg("rows"), py::arg("out"),
          py::arg("num_tokens"), py::arg("num_rows"), py::arg("width"), py::arg("device"), py::arg("stream"));
}

}  // namespace saw::python
