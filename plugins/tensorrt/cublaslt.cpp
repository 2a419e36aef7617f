#include "cublaslt.h"

#include <map>
#include <mutex>
#include <string>

#include <dlfcn.h>

#include "adapter/op.h"

namespace saw::trt::cublaslt {

namespace {

constexpr char const* kNames[] = {"libcublasLt.so.13", "libcublasLt.so.12"};

void* open() {
    for (char const* name : kNames)
        if (void* const found = dlopen(name, RTLD_NOW | RTLD_LOCAL)) return found;
    throw PluginError(
        "SawGemm: neither libcublasLt.so.13 nor libcublasLt.so.12 can be loaded: pip install nvidia-cublas-cu12, or "
        "add the library's folder to LD_LIBRARY_PATH");
}

template <typename Function>
void find(void* library, char const* name, Function& function) {
    function = reinterpret_cast<Function>(dlsym(library, name));
    if (function == nullptr)
        throw PluginError(std::string("SawGemm: libcublasLt has no ") + name + ": install that of CUDA 12 or 13");
}

Library load() {
    void* const from = open();
    Library l{};
    find(from, "cublasLtCreate", l.create);
    find(from, "cublasLtGetStatusName", l.status_name);
    find(from, "cublasLtMatmulDescCreate", l.product_create);
    find(from, "cublasLtMatmulDescSetAttribute", l.product_set);
    find(from, "cublasLtMatmulDescDestroy", l.product_destroy);
    find(from, "cublasLtMatrixLayoutCreate", l.matrix_create);
    find(from, "cublasLtMatrixLayoutDestroy", l.matrix_destroy);
    find(from, "cublasLtMatmulPreferenceCreate", l.preference_create);
    find(from, "cublasLtMatmulPreferenceSetAttribute", l.preference_set);
    find(from, "cublasLtMatmulPreferenceDestroy", l.preference_destroy);
    find(from, "cublasLtMatmulAlgoGetHeuristic", l.heuristic);
    find(from, "cublasLtMatmul", l.matmul);
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
    if (status != 0) throw PluginError(std::string("SawGemm: ") + what + " gave " + library().status_name(status));
}

}  // namespace saw::trt::cublaslt
