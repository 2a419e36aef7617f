// How TensorRT finds the plugins: what this library exports.
//
//   initSawTrtllmPlugins               called by who loads the library (ctypes, a program)
//   getCreators, getPluginCreators     asked for by IPluginRegistry::loadLibrary (trtexec --dynamicPlugins): V3's, V2's
//   setLoggerFinder                    likewise
//
// With SAW_TRTLLM_LOAD_PLUGINS=1 in the environment the library registers them when it is opened, for a program that
// only does that (trtexec --plugins). For LD_PRELOAD there is preload/.
#include <algorithm>
#include <cstdlib>
#include <cstring>
#include <mutex>
#include <vector>

#include "../all_gather.h"
#include "../all_reduce.h"
#include "../gemm.h"
#include "../lookup.h"
#include "../paged_attention.h"
#include "../quantized_gemm.h"
#include "../rms_norm.h"
#include "../rotate_quantize_kv.h"
#include "../silu_mul.h"
#include "names.h"
#include "plugin_v2.h"
#include "plugin_v3.h"
#include "saw/common/pool.h"

#define SAW_EXPORT extern "C" __attribute__((visibility("default")))

SAW_EXPORT bool initSawTrtllmPlugins(void* logger) noexcept;

namespace saw::trt {

namespace {

static_assert(names::kVersion[0] == '0' + kFormatVersion && names::kVersion[1] == '\0',
              "a plugin's version is that of the rows it writes");

#if NV_TENSORRT_MAJOR >= 10
using AnyCreator = nvinfer1::IPluginCreatorInterface;
#else
using AnyCreator = nvinfer1::IPluginCreator;
#endif

constexpr OpFactory kFactories[] = {&RotateQuantizeKv::make,
                                    &Int4PagedAttention::make,
                                    &Gemm::make,
                                    &QuantizedGemm::make,
                                    &Lookup::make,
                                    &RmsNorm::make,
                                    &SiluMul::make,
                                    &AllReduce::make,
                                    &AllGather::make};

// A creator for each, and the same as TensorRT asks for them.
template <typename Creator, typename Listed>
struct Creators {
    std::vector<Creator*> all;
    std::vector<Listed*> listed;

    template <typename... Arguments>
    explicit Creators(Arguments... arguments) {
        for (OpFactory factory : kFactories) all.push_back(new Creator(factory, arguments...));
        listed.assign(all.begin(), all.end());
    }
};

// These are never destroyed: TensorRT's registry may outlive this library's statics.
#if NV_TENSORRT_MAJOR >= 10
auto& creators_v3() {
    static auto* const instance = new Creators<PluginCreatorV3, nvinfer1::IPluginCreatorInterface>;
    return *instance;
}
#endif

#if NV_TENSORRT_MAJOR < 11
auto& creators_v2() {
    static auto* const instance = new Creators<PluginCreatorV2, nvinfer1::IPluginCreator>(
        NV_TENSORRT_MAJOR < 10 ? names::kVersion : names::kVersionOfV2);
    return *instance;
}
#endif

bool same(char const* a, char const* b) { return a != nullptr && b != nullptr && std::strcmp(a, b) == 0; }

// Looked for in the registry's list: TensorRT logs an error for a creator that it is asked for in vain.
template <typename Interface>
bool is_registered(nvinfer1::IPluginRegistry const& registry, Interface const& creator) {
    int32_t count = 0;
#if NV_TENSORRT_MAJOR >= 10
    AnyCreator const* const* const all = registry.getAllCreators(&count);
    auto const is_of_interface = [&](AnyCreator const& other) {
        return same(other.getInterfaceInfo().kind, creator.getInterfaceInfo().kind);
    };
#else
    AnyCreator const* const* const all = registry.getPluginCreatorList(&count);
    auto const is_of_interface = [](AnyCreator const&) { return true; };
#endif
    return std::any_of(all, all + count, [&](AnyCreator const* any) {
        if (!is_of_interface(*any)) return false;
        auto const& other = static_cast<Interface const&>(*any);
        return same(other.getPluginName(), creator.getPluginName()) &&
               same(other.getPluginVersion(), creator.getPluginVersion()) &&
               same(other.getPluginNamespace(), names::kNamespace);
    });
}

template <typename Interface>
void register_creator(nvinfer1::IPluginRegistry& registry, Interface& creator) {
    if (!is_registered(registry, creator) &&
        !registry.registerCreator(static_cast<AnyCreator&>(creator), names::kNamespace))
        throw PluginError(std::string(creator.getPluginName()) + ": TensorRT's registry rejected version " +
                          creator.getPluginVersion() + ": see its own message in the log");
}

void register_all() {
    static std::mutex mutex;
    std::lock_guard<std::mutex> const lock(mutex);
    using GetRegistry = nvinfer1::IPluginRegistry* (*)() noexcept;
    auto const get = reinterpret_cast<GetRegistry>(nvinfer_symbol("getPluginRegistry", /*load=*/true));
    auto* const registry = get == nullptr ? nullptr : get();
    if (registry == nullptr) {
        std::string const major = std::to_string(NV_TENSORRT_MAJOR);
        throw PluginError("TensorRT " + major +
                          ", which these plugins were built for, is not there: load libnvinfer.so." + major +
                          " first, or add its folder to LD_LIBRARY_PATH");
    }
#if NV_TENSORRT_MAJOR >= 10
    for (auto* creator : creators_v3().all) register_creator<nvinfer1::IPluginCreatorV3One>(*registry, *creator);
#endif
#if NV_TENSORRT_MAJOR < 11
    for (auto* creator : creators_v2().all) register_creator<nvinfer1::IPluginCreator>(*registry, *creator);
#endif
}

// As TRT_LLM_LOAD_PLUGINS does for TensorRT-LLM's library.
__attribute__((constructor)) void register_if_asked() {
    char const* const asked = std::getenv("SAW_TRTLLM_LOAD_PLUGINS");
    if (asked != nullptr && std::strcmp(asked, "1") == 0) initSawTrtllmPlugins(nullptr);
}

}  // namespace

}  // namespace saw::trt

// Registers the plugins under the namespace "saw"; again is harmless. `logger` is an nvinfer1::ILogger, or null for
// TensorRT's own. False, with a message in the log, if it could not be done.
SAW_EXPORT bool initSawTrtllmPlugins(void* logger) noexcept {
    using namespace saw::trt;
    if (logger != nullptr) use_logger(static_cast<nvinfer1::ILogger*>(logger));
    return guarded(false, [] {
        register_all();
        return true;
    });
}

SAW_EXPORT void setLoggerFinder(nvinfer1::ILoggerFinder* finder) noexcept { saw::trt::use_logger_finder(finder); }

#if NV_TENSORRT_MAJOR >= 10
SAW_EXPORT nvinfer1::IPluginCreatorInterface* const* getCreators(int32_t& count) noexcept {
    count = 0;
    return saw::trt::guarded(static_cast<nvinfer1::IPluginCreatorInterface* const*>(nullptr), [&] {
        auto const& creators = saw::trt::creators_v3().listed;
        count = int32_t(creators.size());
        return creators.data();
    });
}
#endif

#if NV_TENSORRT_MAJOR < 11
SAW_EXPORT nvinfer1::IPluginCreator* const* getPluginCreators(int32_t& count) noexcept {
    count = 0;
    return saw::trt::guarded(static_cast<nvinfer1::IPluginCreator* const*>(nullptr), [&] {
        auto const& creators = saw::trt::creators_v2().listed;
        count = int32_t(creators.size());
        return creators.data();
    });
}
#endif
