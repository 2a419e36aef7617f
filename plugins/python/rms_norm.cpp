#include "saw/rms_norm/params.h"

#include "bindings.h"

namespace saw::python {

namespace {

int rms_norm(Address x, Address residual, Address weight, Address y, Address sum, int num_rows, int num_heads,
             int num_normed, int width, float epsilon, DType dtype, int device, Address stream) {
    RmsNormParams params{};
    params.x = at<void const>(x);
    params.residual = at<void const>(residual);
    params.weight = at<float const>(weight);
    params.y = at<void>(y);
    params.sum = at<void>(sum);
    params.num_rows = num_rows;
    params.num_heads = num_heads;
    params.num_normed = num_normed;
    params.width = width;
    params.epsilon = epsilon;
    params.dtype = dtype;
    DeviceGuard const guard(device);
    return saw_rms_norm(params, at<CUstream_st>(stream));
}

}  // namespace

void add_rms_norm(py::module_& m) {
    m.def("rms_norm", &rms_norm, ReleaseGil(), py::kw_only(), py::arg("x"), py::arg("residual"), py::arg("weight"),
          py::arg("y"), py::arg("sum"), py::arg("num_rows"), py::arg("num_heads"), py::arg("num_normed"),
          py::arg("width"), py::arg("epsilon"), py::arg("dtype"), py::arg("device"), py::arg("stream"));
}

}  // namespace saw::python
