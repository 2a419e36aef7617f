#include "nccl.h"

#include <string>

#include <dlfcn.h>

#include "adapter/op.h"

namespace saw::trt::nccl {

namespace {

constexpr char kLibrary[] = "libnccl.so.2";

template <typename Function>
void find_symbol(void* library, char const* name, Function& function) {
    function = reinterpret_cast<Function>(dlsym(library, name));
    if (function == nullptr)
        throw PluginError(std::string(kLibrary) + " has no " + name + ": install NCCL 2.18 or newer");
}

Library load_library() {
    void* const from = dlopen(kLibrary, RTLD_NOW | RTLD_LOCAL);
    if (from == nullptr)
        throw PluginError(std::string(kLibrary) +
                          " cannot be loaded: pip install nvidia-nccl-cu12 or nvidia-nccl-cu13");
    Library l{};
    find_symbol(from, "ncclGetErrorString", l.error_string);
    find_symbol(from, "ncclAllReduce", l.all_reduce);
    find_symbol(from, "ncclAllGather", l.all_gather);
    return l;
}

}  // namespace

Library const& library() {
    static Library const loaded = load_library();  // tried again if it throws
    return loaded;
}

void check(Status status, char const* what) {
    if (status != 0) throw PluginError(std::string(what) + " gave: " + library().error_string(status));
}

}  // namespace saw::trt::nccl
