#include "gemm.h"

#include <map>
#include <mutex>
#include <tuple>

#include "cublaslt.h"
#include "names.h"

namespace saw::trt {

namespace {

// What NVIDIA recommends for Hopper.
constexpr size_t kGemmWorkspaceBytes = size_t(32) << 20;
// What TensorRT's tensors have, and the fastest kernels need.
constexpr uint32_t kGemmAlignment = 16;
// A prompt's length is seldom seen again, and a decode's batch often. So many fit a few MiB.
constexpr size_t kMaxGemmPlans = 1 << 14;

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
class GemmPlan {
  public:
    explicit GemmPlan(GemmKey const& key) {
        using cublaslt::check;
        auto const [handle, rows, in, out, type, output_type] = key;
        check(lib_.product_create(&product_.desc, cublaslt::kComputeF32, CUDA_R_32F), "cublasLtMatmulDescCreate");
        check(lib_.product_set(product_.desc, cublaslt::kTransA, &cublaslt::kTranspose, sizeof(cublaslt::kTranspose)),
              "cublasLtMatmulDescSetAttribute");
        check(lib_.matrix_create(&weight_.desc, type, in, out, in), "cublasLtMatrixLayoutCreate");
        check(lib_.matrix_create(&x_.desc, type, in, rows, in), "cublasLtMatrixLayoutCreate");
        check(lib_.matrix_create(&y_.desc, output_type, out, rows, out), "cublasLtMatrixLayoutCreate");

        GemmDesc preference(lib_.preference_destroy);
        check(lib_.preference_create(&preference.desc), "cublasLtMatmulPreferenceCreate");
        auto const set = [&](int attribute, auto const& value) {
            check(lib_.preference_set(preference.desc, attribute, &value, sizeof(value)),
                  "cublasLtMatmulPreferenceSetAttribute");
        };
        set(cublaslt::kMaxWorkspaceBytes, kGemmWorkspaceBytes);
        // Parts of a sum over K are added in fp32, not in y's type.
        set(cublaslt::kReductionSchemes, cublaslt::kReduceInComputeType);
        for (int attribute : cublaslt::kMinAlignment) set(attribute, kGemmAlignment);

        cublaslt::Heuristic best{};
        int found = 0;
        auto const status = lib_.heuristic(handle, product_.desc, weight_.desc, x_.desc, y_.desc, y_.desc,
                                           preference.desc, 1, &best, &found);
        if (status != 0 || found == 0)
            throw PluginError("SawGemm: cuBLASLt has no algorithm for " + std::to_string(rows) + " rows of " +
                              std::to_string(in) + " by a weight of [" + std::to_string(out) + ", " +
                              std::to_string(in) + "] (" + lib_.status_name(status) +
                              "): build with --gemm_plugin disable");
        handle_ = handle;
        algo_ = best.algo;
    }

    void launch(void const* x, void const* weight, void* y, void* workspace, cudaStream_t stream) const {
        float const one = 1.0f, zero = 0.0f;
        cublaslt::check(lib_.matmul(handle_, product_.desc, &one, weight, weight_.desc, x, x_.desc, &zero, y, y_.desc,
                                    y, y_.desc, &algo_, workspace, kGemmWorkspaceBytes, stream),
                        "cublasLtMatmul");
    }

  private:
    cublaslt::Library const& lib_ = cublaslt::library();
    GemmDesc product_{lib_.product_destroy};
    GemmDesc weight_{lib_.matrix_destroy}, x_{lib_.matrix_destroy}, y_{lib_.matrix_destroy};
    cublaslt::Handle handle_ = nullptr;
    cublaslt::Algo algo_{};
};

// Of all layers of a shape, in all contexts: the heuristic takes longer than a launch may.
std::shared_ptr<GemmPlan const> gemm_plan(GemmKey const& key) {
    static std::mutex mutex;
    static auto* const plans = new std::map<GemmKey, std::shared_ptr<GemmPlan const>>;
    std::lock_guard<std::mutex> const lock(mutex);
    if (auto const at = plans->find(key); at != plans->end()) return at->second;
    auto made = std::make_shared<GemmPlan const>(key);
    if (plans->size() >= kMaxGemmPlans) plans->clear();
    plans->emplace(key, made);
    return made;
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
    check_dtype(dtype_);
    if (in_features_ < 1 || out_features_ < 1)
        refuse("in_features is " + std::to_string(in_features_) + " and out_features " + std::to_string(out_features_) +
               ": both must be at least 1");
    if (output_dtype_ != dtype_ && output_dtype_ != "float32")
        refuse("output_dtype is " + output_dtype_ + ": it must be float32 or dtype, " + dtype_);
}

std::vector<Tensor> Gemm::inputs() const {
    auto const type = activation_type(dtype_);
    return {{names::kX, type, {kTokens, in_features_}}, {names::kWeight, type, {out_features_, in_features_}}};
}

std::vector<Tensor> Gemm::outputs() const {
    auto const type = output_dtype_ == "float32" ? nvinfer1::DataType::kFLOAT : activation_type(dtype_);
    return {{names::kY, type, {kTokens, out_features_}}};
}

size_t Gemm::workspace_bytes() const { return kGemmWorkspaceBytes; }

void Gemm::prepare() const { cublaslt::handle(); }

void Gemm::enqueue(Launch const& launch) const {
    void const *const x = launch.inputs[kX], *const weight = launch.inputs[kWeight];
    void* const y = launch.outputs[0];
    for (void const* address : {x, weight, static_cast<void const*>(y)})
        if (reinterpret_cast<uintptr_t>(address) % kGemmAlignment != 0)
            refuse("x, weight or y does not lie on a multiple of " + std::to_string(kGemmAlignment) + " bytes");
    GemmKey const key{cublaslt::handle(), launch.input_desc[kX].dims.d[0], in_features_, out_features_,
                      cuda_type(dtype_),  cuda_type(output_dtype_)};
    gemm_plan(key)->launch(x, weight, y, launch.workspace, launch.stream);
}

}  // namespace saw::trt
