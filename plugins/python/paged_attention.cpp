#include "saw/paged_attention/params.h"

#include "bindings.h"

namespace saw::python {

namespace {

int decode_attention(Address q, Address out, Address sequence_length, Address sinks, PagedPool const& pool,
                     Address workspace, int num_sequences, int num_heads, int head_dim, int window, float softmax_scale,
                     float softcap, DType dtype, CacheType cache, int device, Address stream) {
    DecodeParams params{};
    params.q = at<void const>(q);
    params.out = at<void>(out);
    params.sequence_length = at<int32_t const>(sequence_length);
    params.sinks = at<float const>(sinks);
    params.pool = pool;
    params.workspace = at<void>(workspace);
    params.num_sequences = num_sequences;
    params.num_heads = num_heads;
    params.head_dim = head_dim;
    params.window = window;
    params.softmax_scale = softmax_scale;
    params.softcap = softcap;
    params.dtype = dtype;
    params.cache = cache;
    DeviceGuard const guard(device);
    return saw_decode_attention(params, at<CUstream_st>(stream));
}

int prefill_attention(Address q, Address k, Address v, Address out, Address last_token_ids, Address sequence_length,
                      Address sinks, PagedPool const& pool, int num_tokens, int num_sequences, int num_heads,
                      int head_dim, int window, float softmax_scale, float softcap, DType dtype, CacheType cache,
                      int device, Address stream) {
    PrefillParams params{};
    params.q = at<void const>(q);
    params.k = at<void const>(k);
    params.v = at<void const>(v);
    params.out = at<void>(out);
    params.last_token_ids = at<int32_t const>(last_token_ids);
    params.sequence_length = at<int32_t const>(sequence_length);
    params.sinks = at<float const>(sinks);
    params.pool = pool;
    params.num_tokens = num_tokens;
    params.num_sequences = num_sequences;
    params.num_heads = num_heads;
    params.head_dim = head_dim;
    params.window = window;
    params.softmax_scale = softmax_scale;
    params.softcap = softcap;
    params.dtype = dtype;
    params.cache = cache;
    DeviceGuard const guard(device);
    return saw_prefill_attention(params, at<CUstream_st>(stream));
}

}  // namespace

void add_paged_attention(py::module_& m) {
    m.def("decode_attention", &decode_attention, ReleaseGil(), py::kw_only(), py::arg("q"), py::arg("out"),
          py::arg("sequence_length"), py::arg("sinks"), py::arg("pool"), py::arg("workspace"), py::arg("num_sequences"),
          py::arg("num_heads"), py::arg("head_dim"), py::arg("window"), py::arg("softmax_scale"), py::arg("softcap"),
          py::arg("dtype"), py::arg("cache"), py::arg("device"), py::arg("stream"));
    m.def("prefill_attention", &prefill_attention, ReleaseGil(), py::kw_only(), py::arg("q"), py::arg("k"),
          py::arg("v"), py::arg("out"), py::arg("last_token_ids"), py::arg("sequence_length"), py::arg("sinks"),
          py::arg("pool"), py::arg("num_tokens"), py::arg("num_sequences"), py::arg("num_heads"), py::arg("head_dim"),
          py::arg("window"), py::arg("softmax_scale"), py::arg("softcap"), py::arg("dtype"), py::arg("cache"),
          py::arg("device"), py::arg("stream"));
    m.def("decode_workspace_bytes", &saw_decode_workspace_bytes, py::arg("max_sequences"), py::arg("num_heads"),
          py::arg("num_kv_heads"), py::arg("head_dim"));
}

}  // namespace saw::python
