#include "saw/quantized_gemm/params.h"

#include "bindings.h"

namespace saw::python {

namespace {

PackedWeight packed(Address values, Address scales, WeightType type, int in_features, int out_features, int group) {
    return {at<void const>(values), at<uint32_t const>(scales), type, in_features, out_features, group};
}

int quantized_gemm(Address x, Address values, Address scales, WeightType type, int in_features, int out_features,
                   int group, Address y, int num_rows, DType dtype, int device, Address stream) {
    QuantizedGemmParams params{};
    params.x = at<void const>(x);
    params.weight = packed(values, scales, type, in_features, out_features, group);
    params.y = at<void>(y);
    params.num_rows = num_rows;
    params.dtype = dtype;
    DeviceGuard const guard(device);
    return saw_quantized_gemm(params, at<CUstream_st>(stream));
}

int dequantize(Address values, Address scales, WeightType type, int in_features, int out_features, int group,
               int first_row, int num_rows, Address y, DType dtype, int device, Address stream) {
    DequantizeParams params{};
    params.weight = packed(values, scales, type, in_features, out_features, group);
    params.first_row = first_row;
    params.num_rows = num_rows;
    params.y = at<void>(y);
    params.dtype = dtype;
    DeviceGuard const guard(device);
    return saw_dequantize(params, at<CUstream_st>(stream));
}

int quantize_rows(Address x, int num_rows, int width, DType dtype, Address values, Address scales, int device,
                  Address stream) {
    QuantizeRowsParams params{};
    params.x = at<void const>(x);
    params.num_rows = num_rows;
    params.width = width;
    params.dtype = dtype;
    params.y = {at<void>(values), at<float>(scales)};
    DeviceGuard const guard(device);
    return saw_quantize_rows(params, at<CUstream_st>(stream));
}

int unpack_rows(Address values, Address scales, WeightType type, int in_features, int out_features, int group,
                int first_row, int num_rows, Address row_values, Address row_scales, int device, Address stream) {
    UnpackRowsParams params{};
    params.weight = packed(values, scales, type, in_features, out_features, group);
    params.first_row = first_row;
    params.num_rows = num_rows;
    params.y = {at<void>(row_values), at<float>(row_scales)};
    DeviceGuard const guard(device);
    return saw_unpack_rows(params, at<CUstream_st>(stream));
}

}  // namespace

void add_quantized_gemm(py::module_& m) {
    py::enum_<WeightType>(m, "WeightType").value("int4", WeightType::kInt4).value("fp8", WeightType::kFloat8);
    m.def("quantized_gemm", &quantized_gemm, ReleaseGil(), py::kw_only(), py::arg("x"), py::arg("values"),
          py::arg("scales"), py::arg("type"), py::arg("in_features"), py::arg("out_features"), py::arg("group"),
          py::arg("y"), py::arg("num_rows"), py::arg("dtype"), py::arg("device"), py::arg("stream"));
    m.def("dequantize", &dequantize, ReleaseGil(), py::kw_only(), py::arg("values"), py::arg("scales"), py::arg("type"),
          py::arg("in_features"), py::arg("out_features"), py::arg("group"), py::arg("first_row"), py::arg("num_rows"),
          py::arg("y"), py::arg("dtype"), py::arg("device"), py::arg("stream"));
    m.def("quantize_rows", &quantize_rows, ReleaseGil(), py::kw_only(), py::arg("x"), py::arg("num_rows"),
          py::arg("width"), py::arg("dtype"), py::arg("values"), py::arg("scales"), py::arg("device"),
          py::arg("stream"));
    m.def("unpack_rows", &unpack_rows, ReleaseGil(), py::kw_only(), py::arg("values"), py::arg("scales"),
          py::arg("type"), py::arg("in_features"), py::arg("out_features"), py::arg("group"), py::arg("first_row"),
          py::arg("num_rows"), py::arg("row_values"), py::arg("row_scales"), py::arg("device"), py::arg("stream"));
}

}  // namespace saw::python
