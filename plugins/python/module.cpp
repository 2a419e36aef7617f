// saw_trtllm._C: the host functions of saw/ops.h on addresses. It checks nothing: saw_trtllm/ops.py does.
#include <pybind11/pybind11.h>

#include <cstdint>
#include <string>

#include "saw/ops.h"
#include "saw/philox.h"

namespace py = pybind11;

namespace {

using Address = std::uintptr_t;

template <typename T>
T* at(Address address) {
    return reinterpret_cast<T*>(address);
}

// The device that a launch goes to, and back to the caller's.
class DeviceGuard {
  public:
    explicit DeviceGuard(int device) {
        cudaGetDevice(&before_);
        changed_ = device >= 0 && device != before_ && cudaSetDevice(device) == cudaSuccess;
    }
    ~DeviceGuard() {
        if (changed_) cudaSetDevice(before_);
    }
    DeviceGuard(DeviceGuard const&) = delete;
    DeviceGuard& operator=(DeviceGuard const&) = delete;

  private:
    int before_ = -1;
    bool changed_ = false;
};

saw::PagedPool make_pool(Address base, Address block_offsets, int max_blocks_per_seq, int layer, int num_kv_heads,
                         int tokens_per_block, int row_bytes) {
    return {
        at<uint8_t>(base), at<int32_t const>(block_offsets), max_blocks_per_seq, layer, num_kv_heads, tokens_per_block,
        row_bytes};
}

int kv_write(Address qkv, Address cos_sin, Address position_ids, Address last_token_ids, Address sequence_length,
             Address k_center, Address q_out, Address k_out, Address v_out, saw::PagedPool const& pool, int num_tokens,
             int num_sequences, int num_heads, int head_dim, int hadamard_order, bool rotate_v, float range_factor,
             saw::DType dtype, saw::CacheType cache, int device, Address stream) {
    saw::KvWriteParams params{};
    params.qkv = at<void const>(qkv);
    params.cos_sin = at<float2 const>(cos_sin);
    params.position_ids = at<int32_t const>(position_ids);
    params.last_token_ids = at<int32_t const>(last_token_ids);
    params.sequence_length = at<int32_t const>(sequence_length);
    params.k_center = at<float const>(k_center);
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
    return saw::kv_write(params, at<CUstream_st>(stream));
}

int decode_attention(Address q, Address out, Address sequence_length, Address sinks, saw::PagedPool const& pool,
                     Address workspace, int num_sequences, int num_heads, int head_dim, int window, float softmax_scale,
                     float softcap, saw::DType dtype, saw::CacheType cache, int device, Address stream) {
    saw::DecodeParams params{};
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
    return saw::decode_attention(params, at<CUstream_st>(stream));
}

int prefill_attention(Address q, Address k, Address v, Address out, Address last_token_ids, Address sequence_length,
                      Address sinks, saw::PagedPool const& pool, int num_tokens, int num_sequences, int num_heads,
                      int head_dim, int window, float softmax_scale, float softcap, saw::DType dtype,
                      saw::CacheType cache, int device, Address stream) {
    saw::PrefillParams params{};
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
    return saw::prefill_attention(params, at<CUstream_st>(stream));
}

int sample(Address logits, Address row_ends, Address rows, Address tokens, Address logprobs, int num_rows,
           int vocab_size, Address stream) {
    saw::SampleParams params{};
    params.logits = at<float>(logits);
    params.row_ends = at<int32_t const>(row_ends);
    params.rows = at<saw::SampleRow const>(rows);
    params.tokens = at<int32_t>(tokens);
    params.logprobs = at<double>(logprobs);
    params.num_rows = num_rows;
    params.vocab_size = vocab_size;
    return saw::sample(params, at<CUstream_st>(stream));
}

int resolve_tokens(Address input_ids, int num_tokens, Address tokens, Address stream) {
    return saw::resolve_tokens(at<int32_t>(input_ids), num_tokens, at<int32_t const>(tokens), at<CUstream_st>(stream));
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
    m.attr("FORMAT_VERSION") = saw::kFormatVersion;
    m.attr("MAX_VOCAB") = saw::kMaxVocab;
    m.attr("SAMPLE_ROW_BYTES") = sizeof(saw::SampleRow);
    m.attr("LISTED_TOKEN_BYTES") = sizeof(saw::ListedToken);
    m.def("philox_uniform", &saw::philox_uniform, py::arg("seed"), py::arg("index"));
    m.def("row_bytes", &saw::row_bytes, py::arg("cache"), py::arg("head_dim"));
    m.def("dlpack_view", &dlpack_view, py::arg("capsule"));
    m.def(
        "error_string",
        [](int code) {
            auto const error = static_cast<cudaError_t>(code);
            return std::string(cudaGetErrorName(error)) + ": " + cudaGetErrorString(error);
        },
        py::arg("code"));

    py::enum_<saw::DType>(m, "DType").value("float16", saw::DType::kFloat16).value("bfloat16", saw::DType::kBFloat16);
    py::enum_<saw::CacheType>(m, "CacheType").value("int4", saw::CacheType::kInt4).value("raw", saw::CacheType::kRaw);
    py::class_<saw::PagedPool>(m, "PagedPool")
        .def(py::init(&make_pool), py::kw_only(), py::arg("base"), py::arg("block_offsets"),
             py::arg("max_blocks_per_seq"), py::arg("layer"), py::arg("num_kv_heads"), py::arg("tokens_per_block"),
             py::arg("row_bytes"));

    using ReleaseGil = py::call_guard<py::gil_scoped_release>;
    m.def("kv_write", &kv_write, ReleaseGil(), py::kw_only(), py::arg("qkv"), py::arg("cos_sin"),
          py::arg("position_ids"), py::arg("last_token_ids"), py::arg("sequence_length"), py::arg("k_center"),
          py::arg("q_out"), py::arg("k_out"), py::arg("v_out"), py::arg("pool"), py::arg("num_tokens"),
          py::arg("num_sequences"), py::arg("num_heads"), py::arg("head_dim"), py::arg("hadamard_order"),
          py::arg("rotate_v"), py::arg("range_factor"), py::arg("dtype"), py::arg("cache"), py::arg("device"),
          py::arg("stream"));
    m.def("decode_attention", &decode_attention, ReleaseGil(), py::kw_only(), py::arg("q"), py::arg("out"),
          py::arg("sequence_length"), py::arg("sinks"), py::arg("pool"), py::arg("workspace"), py::arg("num_sequences"),
          py::arg("num_heads"), py::arg("head_dim"), py::arg("window"), py::arg("softmax_scale"), py::arg("softcap"),
          py::arg("dtype"), py::arg("cache"), py::arg("device"), py::arg("stream"));
    m.def("prefill_attention", &prefill_attention, ReleaseGil(), py::kw_only(), py::arg("q"), py::arg("k"),
          py::arg("v"), py::arg("out"), py::arg("last_token_ids"), py::arg("sequence_length"), py::arg("sinks"),
          py::arg("pool"), py::arg("num_tokens"), py::arg("num_sequences"), py::arg("num_heads"), py::arg("head_dim"),
          py::arg("window"), py::arg("softmax_scale"), py::arg("softcap"), py::arg("dtype"), py::arg("cache"),
          py::arg("device"), py::arg("stream"));
    m.def("sample", &sample, ReleaseGil(), py::kw_only(), py::arg("logits"), py::arg("row_ends"), py::arg("rows"),
          py::arg("tokens"), py::arg("logprobs"), py::arg("num_rows"), py::arg("vocab_size"), py::arg("stream"));
    m.def("resolve_tokens", &resolve_tokens, ReleaseGil(), py::kw_only(), py::arg("input_ids"), py::arg("num_tokens"),
          py::arg("tokens"), py::arg("stream"));
    m.def("decode_workspace_bytes", &saw::decode_workspace_bytes, py::arg("max_sequences"), py::arg("num_heads"),
          py::arg("num_kv_heads"), py::arg("head_dim"));
}
