// libsaw_trtllm_preload.so: for LD_PRELOAD, where nobody can add a call. It opens libsaw_trtllm_plugins.so beside
// itself and registers the plugins.
//
// It is a library of its own because the symbols of a preloaded one come before everybody else's: those that TensorRT
// wants of a plugin library (getCreators, setLoggerFinder) would take the place of TensorRT-LLM's own. It exports none.
#include <cstdio>
#include <cstring>
#include <exception>
#include <string>

#include <dlfcn.h>

#include "../nvinfer_library.h"

namespace {

std::string plugin_library() {
    Dl_info info{};
    if (dladdr(reinterpret_cast<void*>(&plugin_library), &info) == 0) return {};
    std::string const self = info.dli_fname;
    return self.substr(0, self.rfind('/') + 1) + "libsaw_trtllm_plugins.so";
}

// Every child of the process comes here too: what has no TensorRT is left alone.
__attribute__((constructor)) void register_plugins() try {
    if (dlopen(saw::trt::kNvinferLibrary, RTLD_LAZY) == nullptr) return;
    std::string const path = plugin_library();
    void* const library = dlopen(path.c_str(), RTLD_NOW | RTLD_LOCAL);
    if (library == nullptr) {
        std::fprintf(stderr, "saw_trtllm: %s: put both libraries in one folder\n", dlerror());
        return;
    }
    // It says itself what goes wrong.
    using Init = bool (*)(void*);
    if (auto const init = reinterpret_cast<Init>(dlsym(library, "initSawTrtllmPlugins"))) init(nullptr);
} catch (std::exception const& e) {
    std::fprintf(stderr, "saw_trtllm: %s\n", e.what());
}

}  // namespace
