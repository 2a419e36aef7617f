// libsaw_trtllm_preload.so: for LD_PRELOAD, where nobody can add a call. It opens the plugin library of the process's
// TensorRT beside itself and registers the plugins.
//
// It is a library of its own because the symbols of a preloaded one come before everybody else's: those that TensorRT
// wants of a plugin library (getCreators, setLoggerFinder) would take the place of TensorRT-LLM's own. It exports none.
#include <cstdio>
#include <exception>
#include <string>

#include <dlfcn.h>

namespace {

std::string folder_of_this_library() {
    Dl_info info{};
    if (dladdr(reinterpret_cast<void*>(&folder_of_this_library), &info) == 0) return {};
    std::string const self = info.dli_fname;
    return self.substr(0, self.rfind('/') + 1);
}

// The major version of the TensorRT that the process has loaded, else of the newest that the loader finds; 0: there is
// none.
int find_tensorrt() {
    for (int const flags : {RTLD_LAZY | RTLD_NOLOAD, RTLD_LAZY})
        for (int const major : {11, 10, 8})
            if (dlopen(("libnvinfer.so." + std::to_string(major)).c_str(), flags) != nullptr) return major;
    return 0;
}

// Every child of the process comes here too: nothing is done in one that has no TensorRT.
__attribute__((constructor)) void register_plugins() try {
    int const major = find_tensorrt();
    if (major == 0) return;
    std::string const path = folder_of_this_library() + "libsaw_trtllm_plugins_trt" + std::to_string(major) + ".so";
    void* const library = dlopen(path.c_str(), RTLD_NOW | RTLD_LOCAL);
    if (library == nullptr) {
        std::fprintf(stderr, "saw_trtllm: %s: put the plugins of TensorRT %d in the folder of the preloaded library\n",
                     dlerror(), major);
        return;
    }
    // It says itself what goes wrong.
    using Init = bool (*)(void*);
    if (auto const init = reinterpret_cast<Init>(dlsym(library, "initSawTrtllmPlugins"))) init(nullptr);
} catch (std::exception const& e) {
    std::fprintf(stderr, "saw_trtllm: %s\n", e.what());
}

}  // namespace
