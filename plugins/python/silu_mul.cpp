#include "saw/silu_mul/params.h"

#include "bindings.h"

namespace saw::python {

namespace {

int silu_mul(Address a, Address b, Address y, size_t count, DType dtype, int device, Address stream) {
    DeviceGuard const guard(device);
    return saw_silu_mul(at<void const>(a), at<void const>(b), at<void>(y), count, dtype, at<CUstream_st>(stream));
}

}  // namespace

void add_silu_mul(py::module_& m) {
    m.def("silu_mul", &silu_mul, ReleaseGil(), py::kw_only(), py::arg("a"), py::arg("b"), py::arg("y"),
          py::arg("count"), py::arg("dtype"), py::arg("device"), py::arg("stream"));
}

}  // namespace saw::python
