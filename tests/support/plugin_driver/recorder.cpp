// The kernels' host functions for a machine without a GPU: they write down what they were called with, as JSON.
#include <sstream>
#include <string>

#include "saw/all_gather/params.h"
#include "saw/all_reduce/params.h"
#include "saw/gemm/params.h"
#include "saw/lookup/params.h"
#include "saw/paged_attention/params.h"
#include "saw/quantized_gemm/params.h"
#include "saw/rms_norm/params.h"
#include "saw/rotate_quantize_kv/params.h"
#include "saw/silu_mul/params.h"

namespace {

std::string calls;
int next_error = 0;

// Members of a JSON object, one a line.
class Call {
  public:
    explicit Call(char const* name) { text_ << "{\"op\": \"" << name << '"'; }
    ~Call() { calls += text_.str() + "}\n"; }

    Call& add(char const* name, void const* address) {
        text_ << ", \"" << name << "\": " << reinterpret_cast<uintptr_t>(address);
        return *this;
    }
    Call& add(char const* name, double value) {
        text_.precision(9);
        text_ << ", \"" << name << "\": " << value;
        return *this;
    }
    Call& add(saw::PagedPool const& pool) {
        return add("base", pool.base)
            .add("block_offsets", pool.block_offsets)
            .add("max_blocks_per_seq", pool.max_blocks_per_seq)
            .add("layer", pool.layer)
            .add("num_kv_heads", pool.num_kv_heads)
            .add("tokens_per_block", pool.tokens_per_block)
            .add("row_bytes", pool.row_bytes);
    }
    Call& add(saw::PackedWeight const& weight) {
        return add("values", weight.values)
            .add("scales", weight.scales)
            .add("type", int(weight.type))
            .add("in_features", weight.in_features)
            .add("out_features", weight.out_features)
            .add("group", weight.group);
    }
    Call& add(saw::Float8Rows const& rows) { return add("codes", rows.values).add("code_scales", rows.scales); }

  private:
    std::ostringstream text_;
};

}  // namespace

#define ADD(member) add(#member, p.member)
#define ADD_ENUM(member) add(#member, double(int(p.member)))

namespace saw {

cudaError_t saw_rotate_quantize_kv(RotateQuantizeKvParams const& p, cudaStream_t stream) {
    Call("rotate_quantize_kv")
        .ADD(qkv)
        .ADD(cos_sin)
        .ADD(position_ids)
        .ADD(last_token_ids)
        .ADD(sequence_length)
        .ADD(k_center)
        .ADD(k_frame)
        .ADD(q_frame)
        .ADD(q_out)
        .ADD(k_out)
        .ADD(v_out)
        .ADD(decode_counters)
        .add(p.pool)
        .ADD(num_tokens)
        .ADD(num_sequences)
        .ADD(num_heads)
        .ADD(head_dim)
        .ADD(hadamard_order)
        .ADD_ENUM(rotate_v)
        .ADD(range_factor)
        .ADD_ENUM(dtype)
        .ADD_ENUM(cache)
        .add("stream", stream);
    return cudaError_t(next_error);
}

size_t saw_decode_workspace_bytes(int max_sequences, int num_heads, int num_kv_heads, int head_dim) {
    return 4096 + size_t(max_sequences) * num_kv_heads * 4 + size_t(num_heads) * head_dim;
}

cudaError_t saw_decode_attention(DecodeParams const& p, cudaStream_t stream) {
    Call("decode_attention")
        .ADD(q)
        .ADD(out)
        .ADD(sequence_length)
        .ADD(sinks)
        .add(p.pool)
        .ADD(workspace)
        .ADD(counters)
        .ADD(num_sequences)
        .ADD(num_heads)
        .ADD(head_dim)
        .ADD(window)
        .ADD(softmax_scale)
        .ADD(softcap)
        .ADD_ENUM(dtype)
        .ADD_ENUM(cache)
        .add("stream", stream);
    return cudaError_t(next_error);
}

cudaError_t saw_prefill_attention(PrefillParams const& p, cudaStream_t stream) {
    Call("prefill_attention")
        .ADD(q)
        .ADD(k)
        .ADD(v)
        .ADD(out)
        .ADD(last_token_ids)
        .ADD(sequence_length)
        .ADD(sinks)
        .add(p.pool)
        .ADD(num_tokens)
        .ADD(num_sequences)
        .ADD(num_heads)
        .ADD(head_dim)
        .ADD(window)
        .ADD(softmax_scale)
        .ADD(softcap)
        .ADD_ENUM(dtype)
        .ADD_ENUM(cache)
        .add("stream", stream);
    return cudaError_t(next_error);
}

cudaError_t saw_lookup(void const* table, int32_t const* rows, void* out, int num_tokens, int num_rows, int width,
                       cudaStream_t stream) {
    Call("lookup")
        .add("table", table)
        .add("rows", rows)
        .add("out", out)
        .add("num_tokens", num_tokens)
        .add("num_rows", num_rows)
        .add("width", width)
        .add("stream", stream);
    return cudaError_t(next_error);
}

cudaError_t saw_rms_norm(RmsNormParams const& p, cudaStream_t stream) {
    Call("rms_norm")
        .ADD(x)
        .ADD(residual)
        .ADD(weight)
        .ADD(y)
        .ADD(sum)
        .ADD(num_rows)
        .ADD(num_heads)
        .ADD(num_normed)
        .ADD(width)
        .ADD(epsilon)
        .ADD_ENUM(dtype)
        .add("stream", stream);
    return cudaError_t(next_error);
}

// Rows up to which a test lets our kernels multiply.
int few_rows_of_test = 0;

bool saw_has_gemm(GemmParams const& p) { return p.num_rows <= few_rows_of_test; }

cudaError_t saw_gemm(GemmParams const& p, cudaStream_t stream) {
    Call("gemm")
        .ADD(x)
        .ADD(weight)
        .ADD(gate)
        .ADD(y)
        .ADD(num_rows)
        .ADD(in_features)
        .ADD(out_features)
        .ADD_ENUM(dtype)
        .add("wide", int(p.wide))
        .add("stream", stream);
    return cudaError_t(next_error);
}

cudaError_t saw_quantized_gemm(QuantizedGemmParams const& p, cudaStream_t stream) {
    Call("quantized_gemm").ADD(x).add(p.weight).ADD(y).ADD(num_rows).ADD_ENUM(dtype).add("stream", stream);
    return cudaError_t(next_error);
}

cudaError_t saw_dequantize(DequantizeParams const& p, cudaStream_t stream) {
    Call("dequantize").add(p.weight).ADD(first_row).ADD(num_rows).ADD(y).ADD_ENUM(dtype).add("stream", stream);
    return cudaError_t(next_error);
}

cudaError_t saw_quantize_rows(QuantizeRowsParams const& p, cudaStream_t stream) {
    Call("quantize_rows").ADD(x).ADD(num_rows).ADD(width).ADD_ENUM(dtype).add(p.y).add("stream", stream);
    return cudaError_t(next_error);
}

cudaError_t saw_unpack_rows(UnpackRowsParams const& p, cudaStream_t stream) {
    Call("unpack_rows").add(p.weight).ADD(first_row).ADD(num_rows).add(p.y).add("stream", stream);
    return cudaError_t(next_error);
}

cudaError_t saw_silu_mul(void const* a, void const* b, void* y, size_t count, DType dtype, cudaStream_t stream) {
    Call("silu_mul")
        .add("a", a)
        .add("b", b)
        .add("y", y)
        .add("count", double(count))
        .add("dtype", int(dtype))
        .add("stream", stream);
    return cudaError_t(next_error);
}

// The ranks that a test has set, of all devices.
Ranks ranks_of_test{};

Ranks const* saw_get_ranks(int) { return ranks_of_test.size > 0 ? &ranks_of_test : nullptr; }

bool saw_is_one_shot(Ranks const& ranks, size_t count) { return count * 2 <= ranks.one_shot_bytes; }

cudaError_t saw_all_reduce(Ranks const& ranks, void const* x, void* y, size_t count, DType dtype, cudaStream_t stream) {
    Call("all_reduce")
        .add("rank", ranks.rank)
        .add("x", x)
        .add("y", y)
        .add("count", double(count))
        .add("dtype", int(dtype))
        .add("stream", stream);
    return cudaError_t(next_error);
}

bool saw_is_one_shot_norm(Ranks const& ranks, int num_rows, int width) {
    return saw_is_one_shot(ranks, size_t(num_rows) * width);
}

cudaError_t saw_all_reduce_norm(Ranks const& ranks, RmsNormParams const& p, cudaStream_t stream) {
    Call("all_reduce_norm")
        .add("rank", ranks.rank)
        .ADD(x)
        .ADD(residual)
        .ADD(weight)
        .ADD(y)
        .ADD(sum)
        .ADD(num_rows)
        .ADD(width)
        .ADD(epsilon)
        .ADD_ENUM(dtype)
        .add("stream", stream);
    return cudaError_t(next_error);
}

cudaError_t saw_all_gather(float const* parts, float* out, int num_ranks, int num_rows, int width, int out_width,
                           cudaStream_t stream) {
    Call("all_gather")
        .add("parts", static_cast<void const*>(parts))
        .add("out", static_cast<void const*>(out))
        .add("num_ranks", num_ranks)
        .add("num_rows", num_rows)
        .add("width", width)
        .add("out_width", out_width)
        .add("stream", stream);
    return cudaError_t(next_error);
}

}  // namespace saw

// Gives the plugins a group of ranks whose sums of so many bytes go by our kernel; of none it takes them away.
extern "C" __attribute__((visibility("default"))) void saw_set_test_ranks(int rank, int size, size_t one_shot_bytes) {
    saw::ranks_of_test = {rank, size, nullptr, one_shot_bytes, {}};
}

extern "C" __attribute__((visibility("default"))) void saw_set_test_few_rows(int rows) { saw::few_rows_of_test = rows; }

// What was called since the last time it was asked, and the error that later calls return.
extern "C" __attribute__((visibility("default"))) char const* saw_recorded_calls(int error_of_next_calls) {
    static std::string given;
    given.swap(calls);
    calls.clear();
    next_error = error_of_next_calls;
    return given.c_str();
}
