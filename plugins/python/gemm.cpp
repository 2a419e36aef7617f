#include "saw/gemm/params.h"

#include "bindings.h"

namespace saw::python {

namespace {

int gemm(Address x, Address weight, Address gate, Address y, int num_rows, int in_features, int out_features,
         DType dtype, bool wide, int device, Address stream) {
    GemmParams params{};
    params.x = at<void const>(x);
    params.weight = at<void const>(weight);
    params.gate = at<void const>(gate);
    params.y = at<void>(y);
    params.num_rows = num_rows;
    params.in_features = in_features;
    params.out_features = out_features;
    params.dtype = dtype;
    params.wide = wide;
    DeviceGuard const guard(device);
    return saw_gemm(params, at<CUstream_st>(stream));
}

}  // namespace

void add_gemm(py::module_& m) {
    m.def("gemm", &gemm, ReleaseGil(), py::kw_only(), py::arg("x"), py::arg("weight"), py::arg("gate"), py::arg("y"),
          py::arg("num_rows"), py::arg("in_features"), py::arg("out_features"), py::arg("dtype"), py::arg("wide"),
          py::arg("device"), py::arg("stream"));
}

}  // namespace saw::python
