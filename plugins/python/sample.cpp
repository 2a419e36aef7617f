#include "saw/sample/params.h"

#include "bindings.h"
#include "saw/sample/philox.h"

namespace saw::python {

namespace {

int sample(Address logits, Address row_ends, Address rows, Address tokens, Address logprobs, Address top_tokens,
           Address top_logprobs, int max_top, int num_rows, int vocab_size, Address stream) {
    SampleParams params{};
    params.logits = at<float>(logits);
    params.row_ends = at<int32_t const>(row_ends);
    params.rows = at<SampleRow const>(rows);
    params.tokens = at<int32_t>(tokens);
    params.logprobs = at<double>(logprobs);
    params.top_tokens = at<int32_t>(top_tokens);
    params.top_logprobs = at<double>(top_logprobs);
    params.max_top = max_top;
    params.num_rows = num_rows;
    params.vocab_size = vocab_size;
    return saw_sample(params, at<CUstream_st>(stream));
}

int resolve_tokens(Address input_ids, int num_tokens, Address tokens, Address stream) {
    return saw_resolve_tokens(at<int32_t>(input_ids), num_tokens, at<int32_t const>(tokens), at<CUstream_st>(stream));
}

}  // namespace

void add_sample(py::module_& m) {
    m.attr("MAX_VOCAB") = kMaxVocab;
    m.attr("SAMPLE_ROW_BYTES") = sizeof(SampleRow);
    m.attr("LISTED_TOKEN_BYTES") = sizeof(ListedToken);
    m.def("philox_uniform", &philox_uniform, py::arg("seed"), py::arg("index"));
    m.def("sample", &sample, ReleaseGil(), py::kw_only(), py::arg("logits"), py::arg("row_ends"), py::arg("rows"),
          py::arg("tokens"), py::arg("logprobs"), py::arg("top_tokens"), py::arg("top_logprobs"), py::arg("max_top"),
          py::arg("num_rows"), py::arg("vocab_size"), py::arg("stream"));
    m.def("resolve_tokens", &resolve_tokens, ReleaseGil(), py::kw_only(), py::arg("input_ids"), py::arg("num_tokens"),
          py::arg("tokens"), py::arg("stream"));
}

}  // namespace saw::python
