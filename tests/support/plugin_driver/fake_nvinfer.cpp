// libnvinfer's two functions that a plugin library calls, and a registry that keeps what it is given.
#include <cstdio>
#include <string>
#include <vector>

#include <NvInferRuntime.h>

using namespace nvinfer1;

namespace {

#if NV_TENSORRT_MAJOR >= 10
using AnyCreator = IPluginCreatorInterface;
#else
using AnyCreator = IPluginCreator;
#endif

struct Entry {
    std::string name, version, name_space;
    AnyCreator* creator;
};

class Log : public ILogger {
  public:
    void log(Severity, char const* message) noexcept override { std::printf("logged: %s\n", message); }
} logger;

class Registry : public IPluginRegistry {
  public:
    ~Registry() noexcept override = default;

#if NV_TENSORRT_MAJOR < 11
    bool registerCreator(IPluginCreator& creator, char const* name_space) noexcept override {
        creator.setPluginNamespace(name_space);
        return add(creator.getPluginName(), creator.getPluginVersion(), name_space, &creator);
    }
#if NV_TENSORRT_MAJOR < 10
    IPluginCreator* const* getPluginCreatorList(int32_t* count) const noexcept override { return listed(count); }
#else
    IPluginCreator* const* getPluginCreatorList(int32_t*) const noexcept override { return nullptr; }
#endif
    IPluginCreator* getPluginCreator(char const* name, char const* version, char const* name_space) noexcept override {
        return static_cast<IPluginCreator*>(asked_for(name, version, name_space));
    }
    bool deregisterCreator(IPluginCreator const&) noexcept override { return false; }
#endif
#if NV_TENSORRT_MAJOR >= 10
    bool registerCreator(IPluginCreatorInterface& creator, char const* name_space) noexcept override {
        std::string const kind = creator.getInterfaceInfo().kind;
#if NV_TENSORRT_MAJOR < 11
        if (kind == "PLUGIN CREATOR_V1") return registerCreator(static_cast<IPluginCreator&>(creator), name_space);
#endif
        auto& v3 = static_cast<IPluginCreatorV3One&>(creator);
        return kind == "PLUGIN CREATOR_V3ONE" && add(v3.getPluginName(), v3.getPluginVersion(), name_space, &v3);
    }
    IPluginCreatorInterface* const* getAllCreators(int32_t* count) const noexcept override { return listed(count); }
    // As of 10.7: before that it overrides nothing.
    IPluginCreatorInterface* const* getAllCreatorsRecursive(int32_t*) noexcept { return nullptr; }
    IPluginCreatorInterface* getCreator(char const* name, char const* version,
                                        char const* name_space) noexcept override {
        return asked_for(name, version, name_space);
    }
    bool deregisterCreator(IPluginCreatorInterface const&) noexcept override { return false; }
    IPluginResource* acquirePluginResource(char const*, IPluginResource*) noexcept override { return nullptr; }
    int32_t releasePluginResource(char const*) noexcept override { return 0; }
#endif
    void setErrorRecorder(IErrorRecorder*) noexcept override {}
    IErrorRecorder* getErrorRecorder() const noexcept override { return nullptr; }
    bool isParentSearchEnabled() const override { return true; }
    void setParentSearchEnabled(bool) override {}
    PluginLibraryHandle loadLibrary(char const*) noexcept override { return nullptr; }
    void deregisterLibrary(PluginLibraryHandle) noexcept override {}

    std::string list() const {
        std::string text;
        for (Entry const& e : entries_) text += e.name_space + "::" + e.name + " " + e.version + "\n";
        return text;
    }
    bool rejects = false;

  private:
    std::vector<Entry> entries_;
    std::vector<AnyCreator*> listed_;

    AnyCreator* const* listed(int32_t* count) const {
        *count = int32_t(listed_.size());
        return listed_.data();
    }
    // As the real one does it.
    AnyCreator* asked_for(char const* name, char const* version, char const* name_space) const {
        auto* const found = find(name, version, name_space);
        if (found == nullptr) {
            std::string const text = std::string("Cannot find plugin: ") + name + ", version: " + version;
            logger.log(ILogger::Severity::kERROR, text.c_str());
        }
        return found;
    }
    AnyCreator* find(std::string const& name, std::string const& version, std::string const& name_space) const {
        for (Entry const& e : entries_)
            if (e.name == name && e.version == version && e.name_space == name_space) return e.creator;
        return nullptr;
    }
    bool add(char const* name, char const* version, char const* name_space, AnyCreator* creator) {
        if (rejects || find(name, version, name_space) != nullptr) return false;
        entries_.push_back({name, version, name_space, creator});
        listed_.push_back(creator);
        return true;
    }
};

Registry registry;

}  // namespace

extern "C" {
__attribute__((visibility("default"))) IPluginRegistry* getPluginRegistry() noexcept { return &registry; }
__attribute__((visibility("default"))) ILogger* getLogger() noexcept { return &logger; }
__attribute__((visibility("default"))) char const* fake_registered() {
    static std::string text;
    text = registry.list();
    return text.c_str();
}
__attribute__((visibility("default"))) void fake_refuse() { registry.rejects = true; }
}
