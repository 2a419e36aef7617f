#include "nccl.h"

#include <string>

#include <dlfcn.h>

#include "adapter/op.h"
#include "adapter/symbols.h"

namespace saw::trt::nccl {

namespace {

constexpr char kLibrary[] = "libnccl.so.2";

Library load_library() {
    void* const from = dlopen(kLibrary, RTLD_NOW | RTLD_LOCAL);
    if (from == nullptr)
        throw PluginError(std::string(kLibrary) +
                          " cannot be loaded: pip install nvidia-nccl-cu12 or nvidia-nccl-cu13");
    auto const find = [from](char const* name, auto& function) {
        find_symbol(from, kLibrary, "install NCCL 2.18 or newer", name, function);
    };
    Library l{};
    find("ncclGetErrorString", l.error_string);
    find("ncclAllReduce", l.all_reduce);
    find("ncclAllGather", l.all_gather);
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
