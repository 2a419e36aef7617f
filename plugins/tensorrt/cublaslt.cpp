#include "cublaslt.h"

#include <map>
#include <mutex>
#include <string>
#include <tuple>

#include <dlfcn.h>

#include "adapter/op.h"
#include "adapter/symbols.h"

namespace saw::trt::cublaslt {

namespace {

constexpr char const* kNames[] = {"libcublasLt.so.13", "libcublasLt.so.12"};

void* open() {
    for (char const* name : kNames)
        if (void* const found = dlopen(name, RTLD_NOW | RTLD_LOCAL)) return found;
    throw PluginError(
        "neither libcublasLt.so.13 nor libcublasLt.so.12 can be loaded: pip install nvidia-cublas-cu12, or "
        "add the library's folder to LD_LIBRARY_PATH");
}

Library load() {
    auto const find = [from = open()](char const* name, auto& function) {
        find_symbol(from, "libcublasLt", "install that of CUDA 12 or 13", name, function);
    };
    Library l{};
    find("cublasLtCreate", l.create);
    find("cublasLtGetStatusName", l.status_name);
    find("cublasLtMatmulDescCreate", l.product_create);
    find("cublasLtMatmulDescSetAttribute", l.product_set);
    find("cublasLtMatmulDescDestroy", l.product_destroy);
    find("cublasLtMatrixLayoutCreate", l.matrix_create);
    find("cublasLtMatrixLayoutDestroy", l.matrix_destroy);
    find("cublasLtMatmulPreferenceCreate", l.preference_create);
    find("cublasLtMatmulPreferenceSetAttribute", l.preference_set);
    find("cublasLtMatmulPreferenceDestroy", l.preference_destroy);
    find("cublasLtMatmulAlgoGetHeuristic", l.heuristic);
    find("cublasLtMatmul", l.matmul);
    return l;
}

}  // namespace

Library const& library() {
    static Library const loaded = load();  // tried again if it throws
    return loaded;
}

Handle handle() {
    int device = 0;
    saw_get_device(&device);  // if it fails, cublasLtCreate says why
    static std::mutex mutex;
    static auto* const handles = new std::map<int, Handle>;  // never destroyed, as the plugins' creators
    std::lock_guard<std::mutex> const lock(mutex);
    Handle& of_device = (*handles)[device];
    if (of_device == nullptr) check(library().create(&of_device), "cublasLtCreate");
    return of_device;
}

void check(Status status, char const* what) {
    if (status != 0) throw PluginError(std::string(what) + " gave " + library().status_name(status));
}

namespace {

struct OwnDesc {
    Status (*destroy)(Desc);
    Desc desc = nullptr;

    explicit OwnDesc(Status (*destroy)(Desc)) : destroy(destroy) {}
    OwnDesc(OwnDesc const&) = delete;
    ~OwnDesc() {
        if (desc != nullptr) destroy(desc);
    }
};

// What the heuristic gives: an algorithm, if there is one.
struct Best {
    Status status = 0;
    bool found = false;
    Algo algo{};
};

// In cuBLASLt's columns: y and x transposed are theirs, so that it is weight, transposed, times x.
class Product {
  public:
    Product(Handle handle, Linear const& linear, RowScales const* scales) : handle_(handle) {
        auto const [rows, in, out, y_stride, type, output_type] = linear;
        check(lib_.product_create(&product_.desc, kComputeF32, CUDA_R_32F), "cublasLtMatmulDescCreate");
        auto const set = [&](int attribute, auto const& value) {
            return lib_.product_set(product_.desc, attribute, &value, sizeof(value));
        };
        check(set(kTransA, kTranspose), "cublasLtMatmulDescSetAttribute");
        if (scales != nullptr) {
            for (int mode : kScaleMode)
                if (auto const status = set(mode, kScaleOfEachRow)) lacks_ = status;
            check(set(kScale[0], scales->of_weight), "cublasLtMatmulDescSetAttribute");
            check(set(kScale[1], scales->of_x), "cublasLtMatmulDescSetAttribute");
        }
        check(lib_.matrix_create(&weight_.desc, type, in, out, in), "cublasLtMatrixLayoutCreate");
        check(lib_.matrix_create(&x_.desc, type, in, rows, in), "cublasLtMatrixLayoutCreate");
        check(lib_.matrix_create(&y_.desc, output_type, out, rows, y_stride), "cublasLtMatrixLayoutCreate");
    }

    Best best() const {
        if (lacks_ != 0) return {lacks_};
        OwnDesc preference(lib_.preference_destroy);
        check(lib_.preference_create(&preference.desc), "cublasLtMatmulPreferenceCreate");
        auto const set = [&](int attribute, auto const& value) {
            check(lib_.preference_set(preference.desc, attribute, &value, sizeof(value)),
                  "cublasLtMatmulPreferenceSetAttribute");
        };
        set(kMaxWorkspaceBytes, kWorkspaceBytes);
        // Parts of a sum over in_features are added in fp32, not in y's type.
        set(kReductionSchemes, kReduceInComputeType);
        for (int attribute : kMinAlignment) set(attribute, kAlignment);

        Heuristic best{};
        int found = 0;
        auto const status = lib_.heuristic(handle_, product_.desc, weight_.desc, x_.desc, y_.desc, y_.desc,
                                           preference.desc, 1, &best, &found);
        return {status, status == 0 && found != 0, best.algo};
    }

    Status launch(Algo const& algo, void const* x, void const* weight, void* y, void* workspace,
                  cudaStream_t stream) const {
        float const one = 1.0f, zero = 0.0f;
        return lib_.matmul(handle_, product_.desc, &one, weight, weight_.desc, x, x_.desc, &zero, y, y_.desc, y,
                           y_.desc, &algo, workspace, kWorkspaceBytes, stream);
    }

  private:
    Library const& lib_ = library();
    Handle handle_;
    Status lacks_ = 0;  // what a library says that does not know scales of rows
    OwnDesc product_{lib_.product_destroy};
    OwnDesc weight_{lib_.matrix_destroy}, x_{lib_.matrix_destroy}, y_{lib_.matrix_destroy};
};

// One algorithm serves so many rows: the heuristic takes half a millisecond, and a prompt's length is seldom seen
// again. Exact below 32, then 16 to an octave, which the sizes of decodes' graphs are among.
int64_t rounded_up(int64_t rows) {
    int64_t step = 1;
    while (step * 32 <= rows) step *= 2;
    return (rows + step - 1) / step * step;
}

// Of all layers of a shape, in all contexts of a device.
Best known_best(Handle handle, Linear const& linear, RowScales const* scales) {
    using Key = std::tuple<Handle, int64_t, int64_t, int64_t, int64_t, cudaDataType, cudaDataType>;
    static std::mutex mutex;
    static auto* const known = new std::map<Key, Best>;
    auto const [rows, in, out, y_stride, type, output_type] = linear;
    Key const key{handle, rows, in, out, y_stride, type, output_type};
    std::lock_guard<std::mutex> const lock(mutex);
    auto at = known->find(key);
    if (at == known->end()) at = known->emplace(key, Product(handle, linear, scales).best()).first;
    return at->second;
}

Best run(Linear const& linear, RowScales const* scales, void const* x, void const* weight, void* y, void* workspace,
         cudaStream_t stream) {
    Handle const on_device = handle();
    Product const product(on_device, linear, scales);
    Linear rounded = linear;
    rounded.rows = rounded_up(linear.rows);
    Best best = known_best(on_device, rounded, scales);
    if (!best.found) return best;
    auto status = product.launch(best.algo, x, weight, y, workspace, stream);
    // In case that a few more rows have one that these do not.
    if (status != 0 && rounded.rows != linear.rows) {
        best = product.best();
        if (!best.found) return best;
        status = product.launch(best.algo, x, weight, y, workspace, stream);
    }
    check(status, "cublasLtMatmul");
    return best;
}

}  // namespace

void multiply(Linear const& linear, void const* x, void const* weight, void* y, void* workspace, cudaStream_t stream) {
    auto const best = run(linear, nullptr, x, weight, y, workspace, stream);
    if (best.found) return;
    auto const out = std::to_string(linear.out), in = std::to_string(linear.in);
    throw PluginError("cuBLASLt has no algorithm for " + std::to_string(linear.rows) + " rows of " + in +
                      " by a weight of [" + out + ", " + in + "] (" + library().status_name(best.status) +
                      "): build with --gemm_plugin disable, or of quantized weights with --qformat full_prec as well");
}

bool has_scaled(Linear linear, RowScales const& scales) {
    linear.rows = rounded_up(linear.rows);
    return known_best(handle(), linear, &scales).found;
}

bool multiply_scaled(Linear const& linear, RowScales const& scales, void const* x, void const* weight, void* y,
                     void* workspace, cudaStream_t stream) {
    return run(linear, &scales, x, weight, y, workspace, stream).found;
}

}  // namespace saw::trt::cublaslt
