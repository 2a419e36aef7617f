// saw_trtllm._C: the operations of libsaw_kernels.so on addresses. It checks nothing: saw_trtllm/ops does.
#include <string>

#include "bindings.h"
#include "saw/common/pool.h"

namespace saw::python {

namespace {

PagedPool make_pool(Address base, Address block_offsets, int max_blocks_per_seq, int layer, int num_kv_heads,
                    int tokens_per_block, int row_bytes) {
    return {
        at<uint8_t>(base), at<int32_t const>(block_offsets), max_blocks_per_seq, layer, num_kv_heads, tokens_per_block,
        row_bytes};
}

// The few fields of a DLPack 0.8 capsule (github.com/dmlc/dlpack) that say where an array lies and what it is.
struct DLTensor {
    void* data;
    struct {
        int32_t type, id;
    } device;
    int32_t ndim;
    struct {
        uint8_t code, bits;
        uint16_t lanes;
    } dtype;
    int64_t* shape;
    int64_t* strides;  // in elements; null if contiguous
    uint64_t byte_offset;
};

py::tuple to_tuple(int64_t const* values, int32_t n) {
    py::tuple result(n);
    for (int32_t i = 0; i < n; ++i) result[i] = py::int_(values[i]);
    return result;
}

// (address, shape, strides in elements or None, (type code, bits)). The capsule stays its exporter's: it is not
// consumed.
py::tuple dlpack_view(py::capsule const& capsule) {
    auto* const managed = static_cast<DLTensor*>(PyCapsule_GetPointer(capsule.ptr(), "dltensor"));
    if (managed == nullptr) throw py::error_already_set();
    DLTensor const& t = *managed;
    py::object strides = py::none();
    if (t.strides != nullptr) strides = to_tuple(t.strides, t.ndim);
    auto const address = reinterpret_cast<Address>(t.data) + t.byte_offset;
    return py::make_tuple(address, to_tuple(t.shape, t.ndim), strides, py::make_tuple(t.dtype.code, t.dtype.bits));
}

}  // namespace

PYBIND11_MODULE(_C, m) {
    m.doc() = "The kernels of saw_trtllm on addresses; use saw_trtllm.ops, which checks what it is given.";
    m.attr("FORMAT_VERSION") = kFormatVersion;
    m.attr("KERNELS_VERSION") = saw_kernels_version();
    m.attr("ARCHITECTURES") = saw_kernels_architectures();
    m.def("row_bytes", &row_bytes, py::arg("cache"), py::arg("head_dim"));
    m.def("key_row_bytes", &key_row_bytes, py::arg("cache"), py::arg("head_dim"));
    m.def("dlpack_view", &dlpack_view, py::arg("capsule"));
    m.def(
        "error_string",
        [](int code) {
            auto const error = static_cast<cudaError_t>(code);
            return std::string(saw_error_name(error)) + ": " + saw_error_string(error);
        },
        py::arg("code"));

    py::enum_<DType>(m, "DType").value("float16", DType::kFloat16).value("bfloat16", DType::kBFloat16);
    py::enum_<CacheType>(m, "CacheType")
        .value("int4", CacheType::kInt4)
        .value("unquantized", CacheType::kUnquantized)
        .value("key8_value4", CacheType::kKey8Value4);
    py::class_<PagedPool>(m, "PagedPool")
        .def(py::init(&make_pool), py::kw_only(), py::arg("base"), py::arg("block_offsets"),
             py::arg("max_blocks_per_seq"), py::arg("layer"), py::arg("num_kv_heads"), py::arg("tokens_per_block"),
             py::arg("row_bytes"));

    add_rotate_quantize_kv(m);
    add_paged_attention(m);
    add_quantized_gemm(m);
    add_sample(m);
    add_rms_norm(m);
    add_silu_mul(m);
    add_gemm(m);
    add_lookup(m);
    add_all_reduce(m);
    add_all_gather(m);
}

}  // namespace saw::python
