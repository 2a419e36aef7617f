#include "gemm.h"

#include <map>
#include <mutex>
#include <tuple>

#include "adapter/names.h"
#include "cublaslt.h"

namespace saw::trt {

namespace {

// What NVIDIA recommends for Hopper.
constexpr size_t kGemmWorkspaceBytes = size_t(32) << 20;
// What TensorRT's tensors have, and the fastest kernels need.
constexpr uint32_t kGemmAlignment = 16;
cudaDataType cuda_type(std::string const& dtype) {
    return dtype == "float32" ? CUDA_R_32F : dtype == "bfloat16" ? CUDA_R_16BF : CUDA_R_16F;
}

struct GemmDesc {
    cublaslt::Status (*destroy)(cublaslt::Desc);
    cublaslt::Desc desc = nullptr;

    explicit GemmDesc(cublaslt::Status (*destroy)(cublaslt::Desc)) : destroy(destroy) {}
    GemmDesc(GemmDesc const&) = delete;
    ~GemmDesc() {
        if (desc != nullptr) destroy(desc);
    }
};

// A device's handle, rows, in_features, out_features, dtype, output_dtype.
using GemmKey = std::tuple<cublaslt::Handle, int64_t, int64_t, int64_t, cudaDataType, cudaDataType>;

// y = x · weightᵀ in cuBLASLt's columns: y and x transposed are theirs, so that it is weight, transposed, times x.
class Product {
  public:
    explicit Product(GemmKey const& key) : key_(key) {
        using cublaslt::check;
        auto const [handle, rows, in, out, type, output_type] = key;
        check(lib_.product_create(&product_.desc, cublaslt::kComputeF32, CUDA_R_32F), "cublasLtMatmulDescCreate");
        check(lib_.product_set(product_.desc, cublaslt::kTransA, &cublaslt::kTranspose, sizeof(cublaslt::kTranspose)),
              "cublasLtMatmulDescSetAttribute");
        check(lib_.matrix_create(&weight_.desc, type, in, out, in), "cublasLtMatrixLayoutCreate");
        check(lib_.matrix_create(&x_.desc, type, in, rows, in), "cublasLtMatrixLayoutCreate");
        check(lib_.matrix_create(&y_.desc, output_type, out, rows, out), "cublasLtMatrixLayoutCreate");
    }

    cublaslt::Algo best() const {
        GemmDesc preference(lib_.preference_destroy);
        cublaslt::check(lib_.preference_create(&preference.desc), "cublasLtMatmulPreferenceCreate");
        auto const set = [&](int attribute, auto const& value) {
            cublaslt::check(lib_.preference_set(preference.desc, attribute, &value, sizeof(value)),
                            "cublasLtMatmulPreferenceSetAttribute");
        };
        set(cublaslt::kMaxWorkspaceBytes, kGemmWorkspaceBytes);
        // Parts of a sum over in_features are added in fp32, not in y's type.
        set(cublaslt::kReductionSchemes, cublaslt::kReduceInComputeType);
        for (int attribute : cublaslt::kMinAlignment) set(attribute, kGemmAlignment);

        auto const [handle, rows, in, out, type, output_type] = key_;
        cublaslt::Heuristic best{};
        int found = 0;
        auto const status = lib_.heuristic(handle, product_.desc, weight_.desc, x_.desc, y_.desc, y_.desc,
                                           preference.desc, 1, &best, &found);
        if (status != 0 || found == 0)
            throw PluginError("SawGemm: cuBLASLt has no algorithm for " + std::to_string(rows) + " rows of " +
                              std::to_string(in) + " by a weight of [" + std::to_string(out) + ", " +
                              std::to_string(in) + "] (" + lib_.status_name(status) +
                              "): build with --gemm_plugin disable");
        return best.algo;
    }

    cublaslt::Status launch(cublaslt::Algo const& algo, void const* x, void const* weight, void* y, void* workspace,
                            cudaStream_t stream) const {
        float const one = 1.0f, zero = 0.0f;
        return lib_.matmul(std::get<0>(key_), product_.desc, &one, weight, weight_.desc, x, x_.desc, &zero, y, y_.desc,
                           y, y_.desc, &algo, workspace, kGemmWorkspaceBytes, stream);
    }

  private:
    cublaslt::Library const& lib_ = cublaslt::library();
    GemmKey key_;
    GemmDesc product_{lib_.product_destroy};
    GemmDesc weight_{lib_.matrix_destroy}, x_{lib_.matrix_destroy}, y_{lib_.matrix_destroy};
};

// One algorithm serves so many rows: the heuristic takes half a millisecond, and a prompt's length is seldom seen
// again. Exact below 32, then 16 to an octave, which the sizes of decodes' graphs are among.
int64_t rounded_up(int64_t rows) {
    int64_t step = 1;
    while (step * 32 <= rows) step *= 2;
    return (rows + step - 1) / step * step;
}

// Of all layers of a shape, in all contexts.
cublaslt::Algo known_best(GemmKey const& key) {
    static std::mutex mutex;
    static auto* const known = new std::map<GemmKey, cublaslt::Algo>;
    std::lock_guard<std::mutex> const lock(mutex);
    auto at = known->find(key);
    if (at == known->end()) at = known->emplace(key, Product(key).best()).first;
    return at->second;
}

}  // namespace

char const* Gemm::name() const { return names::kGemm; }

std::vector<Field> Gemm::fields() {
    return {{names::kDtype, &dtype_, true},
            {names::kInFeatures, &in_features_, true},
            {names::kOutFeatures, &out_features_, true},
            {names::kOutputDtype, &output_dtype_, true}};
}

void Gemm::validate() const {
    check_dtype();
    if (in_features_ < 1 || out_features_ < 1)
        reject("in_features is " + std::to_string(in_features_) + " and out_features " + std::to_string(out_features_) +
               ": both must be at least 1");
    check_count("the numbers of a row", in_features_, names::kInFeatures);
    check_count("the numbers of a row", out_features_, names::kOutFeatures);
    if (output_dtype_ != dtype_ && output_dtype_ != "float32")
        reject("output_dtype is " + output_dtype_ + ": it must be float32 or dtype, " + dtype_);
}

std::vector<Tensor> Gemm::inputs() const {
    auto const type = activation_type();
    return {{names::kX, type, {kTokens, in_features_}}, {names::kWeight, type, {out_features_, in_features_}}};
}

std::vector<Tensor> Gemm::outputs() const {
    auto const type = output_dtype_ == "float32" ? nvinfer1::DataType::kFLOAT : activation_type();
    return {{names::kY, type, {kTokens, out_features_}}};
}

size_t Gemm::workspace_bytes() const { return kGemmWorkspaceBytes; }

void Gemm::prepare() const { cublaslt::handle(); }

void Gemm::enqueue(Launch const& launch) const {
    void const *const x = launch.inputs[kX], *const weight = launch.inputs[kWeight];
    void* const y = launch.outputs[0];
    for (void const* address : {x, weight, static_cast<void const*>(y)})
        if (reinterpret_cast<uintptr_t>(address) % kGemmAlignment != 0)
            reject("x, weight or y does not lie on a multiple of " + std::to_string(kGemmAlignment) + " bytes");
    GemmKey key{cublaslt::handle(), launch.input_desc[kX].dims.d[0], in_features_, out_features_,
                cuda_type(dtype_),  cuda_type(output_dtype_)};
    Product const product(key);
    auto& rows = std::get<1>(key);
    bool const rounded = rounded_up(rows) != rows;
    rows = rounded_up(rows);
    auto status = product.launch(known_best(key), x, weight, y, launch.workspace, launch.stream);
    // In case that a few more rows have one that these do not.
    if (status != 0 && rounded) status = product.launch(product.best(), x, weight, y, launch.workspace, launch.stream);
    cublaslt::check(status, "cublasLtMatmul");
}

}  // namespace saw::trt
