#include "saw/rotate_quantize_kv/params.h"

#include "bindings.h"

namespace saw::python {

namespace {

int rotate_quantize_kv(Address qkv, Address cos_sin, Address position_ids, Address last_token_ids,
                       Address sequence_length, Address k_center, Address k_frame, Address q_frame, Address q_out,
                       Address k_out, Address v_out, PagedPool const& pool, int num_tokens, int num_sequences,
                       int num_heads, int head_dim, int hadamard_order, bool rotate_v, float range_factor, DType dtype,
                       CacheType cache, int device, Address stream) {
    RotateQuantizeKvParams params{};
    params.qkv = at<void const>(qkv);
    params.cos_sin = at<float2 const>(cos_sin);
    params.position_ids = at<int32_t const>(position_ids);
    params.last_token_ids = at<int32_t const>(last_token_ids);
    params.sequence_length = at<int32_t const>(sequence_length);
    params.k_center = at<float const>(k_center);
    params.k_frame = at<void const>(k_frame);
    params.q_frame = at<void const>(q_frame);
    params.q_out = at<void>(q_out);
    params.k_out = at<void>(k_out);
    params.v_out = at<void>(v_out);
    params.pool = pool;
    params.num_tokens = num_tokens;
    params.num_sequences = num_sequences;
    params.num_heads = num_heads;
    params.head_dim = head_dim;
    params.hadamard_order = hadamard_order;
    params.rotate_v = rotate_v;
    params.range_factor = range_factor;
    params.dtype = dtype;
    params.cache = cache;
    DeviceGuard const guard(device);
    return saw_rotate_quantize_kv(params, at<CUstream_st>(stream));
}

}  // namespace

void add_rotate_quantize_kv(py::module_& m) {
    m.def("rotate_quantize_kv", &rotate_quantize_kv, ReleaseGil(), py::kw_only(), py::arg("qkv"), py::arg("cos_sin"),
          py::arg("position_ids"), py::arg("last_token_ids"), py::arg("sequence_length"), py::arg("k_center"),
          py::arg("k_frame"), py::arg("q_frame"), py::arg("q_out"), py::arg("k_out"), py::arg("v_out"), py::arg("pool"),
          py::arg("num_tokens"), py::arg("num_sequences"), py::arg("num_heads"), py::arg("head_dim"),
          py::arg("hadamard_order"), py::arg("rotate_v"), py::arg("range_factor"), py::arg("dtype"), py::arg("cache"),
          py::arg("device"), py::arg("stream"));
}

}  // namespace saw::python
